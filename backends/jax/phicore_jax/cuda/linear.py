"""Products with a quantized matrix on a GPU, weights as they are in memory.

Of a few rows: a lane takes a group of 32 weights at a time, whose codes it loads 16 bytes at once;
a warp takes two rows of the matrix, so that activations that were loaded are used more than once.
These are integers: in each group multiples of 1 / 32512 of the largest, as two signed bytes, since
a GPU multiplies four bytes in one instruction (`dp4a`) and would need eight to expand and multiply
four weights in float32. Sums of a group are exact; the result is within 3e-5 of float64.

Of many rows: a part of the matrix at a time is expanded, to numbers of 16 bits that tensor cores
multiply. Two of bfloat16 are a weight to within 2**-17, one of float16 to within 2**-11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from phicore_jax.cuda.formats import GROUP, Format
from phicore_jax.cuda.warp import LANES, Warp
from phicore_jax.kernels.attention import exp
from phicore_jax.kernels.lang import F16, F32, I8, I16, I32, Value, suffix, vec

LARGEST = 127 * 256  # both bytes of a multiple are signed


def emit_quantize(w: Warp, groups: int, args: Sequence[Value]) -> None:
    """Write what a warp does to quantize a group of activations, a lane for each number.

    Args:
        groups: G, of all rows.
        args: Pointers to the activations, (G, 32) float32, and to the results: bytes (G, 2, 32)
            int8, the upper bytes of a group and then the lower ones; the unit of each group, (G,)
            float32; the sums of the halves of each group, (G, 2) int32.
    """
    activations, *results = args
    with w.f.when(w.number < groups):
        (x,) = w.load(F32, activations, w.spread(w.number * GROUP) + w.lane)
        _store_integers(w, x, results)


def emit_quantize_normed(
    w: Warp, groups: int, columns: int, eps: float, args: Sequence[Value]
) -> None:
    """Write what a warp does to quantize a group of RMSNorm's result, which is not stored.

    Each warp computes the mean square of its row: reading that again is quicker than a launch.

    Args:
        columns: E, the length of a row.
        args: Pointers to the rows, the weight, and the results.
    """
    f = w.f
    rows, weight, *results = args
    with f.when(w.number < groups):
        groups_of_row = columns // GROUP
        row, group = w.number // groups_of_row, w.number % groups_of_row
        total = w.spread(f.f32(0.0))
        together = 4 if columns % (4 * LANES) == 0 else 1
        for start in range(0, columns // together, LANES):
            at = w.spread(row * (columns // together) + start) + w.lane
            for number in w.load(F32, rows, at, together):
                total = f.fma(number, number, total)
        mean = w.sum(total) * (1 / columns)
        root = f.call(f"llvm.sqrt{suffix(mean.type)}", mean.type, mean + eps)
        column = w.spread(group * GROUP) + w.lane
        (x,) = w.load(F32, rows, w.spread(row * columns) + column)
        (factor,) = w.load(F32, weight, column)
        _store_integers(w, factor * (x / root), results)


def emit_quantize_gated(w: Warp, groups: int, columns: int, args: Sequence[Value]) -> None:
    """Write what a warp does to quantize a group of SwiGLU's result, which is not stored.

    Args:
        columns: F, the length of a row of the result.
        args: Pointers to gates and then as many others in a row, and the results.
    """
    f = w.f
    gate_up, *results = args
    with f.when(w.number < groups):
        groups_of_row = columns // GROUP
        row, group = w.number // groups_of_row, w.number % groups_of_row
        at = w.spread(row * (2 * columns) + group * GROUP) + w.lane
        (gate,), (up,) = w.load(F32, gate_up, at), w.load(F32, gate_up, at + columns)
        # of the gate's size, so that nothing overflows
        power = exp(f, f.like(gate, 0.0) - f.absolute(gate))
        share = (gate < 0.0).select(power, 1.0) / (power + 1.0)
        _store_integers(w, gate * share * up, results)


def _store_integers(w: Warp, x: Value, results: Sequence[Value]) -> None:
    """The group of a warp's number, of which a lane has x."""
    f = w.f
    both, units, sums = results
    group = w.spread(w.number)
    largest = w.max(f.absolute(x))
    unit = (largest > 1e-30).select(largest, 1.0) * (1 / LARGEST)
    integer = f.round_even(x / unit).to(I32)
    upper = (integer + 128) >> 8
    byte = group * (2 * GROUP) + w.lane
    w.store([upper.to(I8)], both, byte)
    w.store([(integer - (upper << 8)).to(I8)], both, byte + GROUP)
    # a sum that is not finite must not vanish in an integer
    w.store([unit + w.sum(x * 0.0)], units, group, w.lane.equals(0))
    half = w.sum(integer, (8, 4, 2, 1))
    w.store([half], sums, group * 2 + (w.lane >> 4), (w.lane & 15).equals(0))


def rows_of_warp(m: int) -> int:
    """Rows of the matrix that a warp takes; with many of the activations, registers run out."""
    return 2 if m <= 4 else 1


def emit_product(
    w: Warp, fmt: Format, shape: tuple[int, int], m: int, args: Sequence[Value]
) -> None:
    """What a warp does for y (M, N) = x (M, K) @ weight.T.

    Args:
        shape: N, K.
        m: M.
        args: Pointers: what `emit_quantize` makes of x, the planes of the weight, y.
    """
    count = rows_of_warp(m)
    numbers = [w.number * count + r for r in range(count)]
    rows_of_x = [w.f.i32(i) for i in range(m)]
    _product(w, fmt, shape, numbers, w.f.i32(0), rows_of_x, args)


def emit_expert_product(
    w: Warp, fmt: Format, shape: tuple[int, int], m: int, args: Sequence[Value]
) -> None:
    """Write the product of each row of x and a matrix of its own. The matrices are stacked.

    Args:
        args: The first is a pointer to the matrices' numbers, (M,) int32.
    """
    experts, *others = args
    count = rows_of_warp(1)
    warps = -(-shape[0] // count)  # of a row of x
    with w.f.when(w.number < m * warps):
        row_of_x = w.number // warps
        numbers = [w.number % warps * count + r for r in range(count)]
        first = w.uniform(I32, experts, row_of_x) * shape[0]
        _product(w, fmt, shape, numbers, first, [row_of_x], others)


def _product(
    w: Warp,
    fmt: Format,
    shape: tuple[int, int],
    numbers: Sequence[Value],
    first: Value,
    rows_of_x: Sequence[Value],
    args: Sequence[Value],
) -> None:
    """Some rows of the weight, which begins at row `first`, by rows of x."""
    f = w.f
    rows, columns = shape
    groups, m = columns // GROUP, len(rows_of_x)
    activations, units, sums, *planes, y = args
    # beyond the last row it is computed again, and not stored
    row = [w.spread(first + (n < rows).select(n, rows - 1)) for n in numbers]
    total = [[w.spread(f.f32(0.0))] * m for _ in numbers]
    for start in range(0, groups, LANES):
        group, is_there = w.lane + start, None
        if start + LANES > groups:
            is_there = group < groups
            group = is_there.select(group, groups - 1)
        weights = [fmt.read(w, planes, r, group, groups) for r in row]
        for i, row_of_x in enumerate(rows_of_x):
            at = group + w.spread(row_of_x * groups)
            words = [q for part in range(4) for q in w.load(I32, activations, at * 4 + part, 4)]
            (unit,) = w.load(I32, units, at)
            unit = unit.bits_as(total[0][i].type)
            halves = w.load(I32, sums, at, 2)
            for r in range(len(numbers)):
                added = weights[r].times(w, words, halves) * unit
                if is_there is not None:
                    added = is_there.select(added, 0.0)
                total[r][i] = total[r][i] + added
    for r, number in enumerate(numbers):
        for i, row_of_x in enumerate(rows_of_x):
            is_first = w.lane.equals(0) & w.spread(number < rows)
            w.store([w.sum(total[r][i])], y, w.spread(number + row_of_x * rows), is_first)


def emit_expand(
    w: Warp,
    fmt: Format,
    columns: int,
    part: tuple[int, int],
    is_fast: bool,
    args: Sequence[Value],
) -> None:
    """What a warp does to expand 32 groups.

    Args:
        columns: K.
        part: The first row of the matrix that is wanted, and how many.
        is_fast: Make float16 of the weights, (rows, K); else bfloat16, (rows, 3, K): what is
            nearest to a weight, what is nearest to the rest, and the first again.
        args: Pointers: the planes of the weight, the result.
    """
    *planes, result = args
    _expand(w, fmt, columns, part[1], w.f.i32(part[0]), is_fast, planes, result)


def emit_expert_expand(
    w: Warp,
    fmt: Format,
    shape: tuple[int, int],
    part: tuple[int, int],
    is_fast: bool,
    args: Sequence[Value],
) -> None:
    """Write what `emit_expand` does, for one of several stacked matrices.

    Args:
        shape: N, K of each.
        args: The first is a pointer to the matrix's number, (1,) int32.
    """
    expert, *planes, result = args
    first = w.uniform(I32, expert, w.f.i32(0)) * shape[0] + part[0]
    _expand(w, fmt, shape[1], part[1], first, is_fast, planes, result)


def _expand(
    w: Warp,
    fmt: Format,
    columns: int,
    rows: int,
    first: Value,
    is_fast: bool,
    planes: Sequence[Value],
    result: Value,
) -> None:
    groups = columns // GROUP
    number = w.spread(w.number * LANES) + w.lane
    is_there = number < rows * groups
    number = is_there.select(number, 0)
    row, group = number // groups, number % groups
    weights = fmt.read(w, planes, row + w.spread(first), group, groups)
    values = weights.values()
    if is_fast:
        parts = [[_bits(v.to(F16)) for v in values]]
    else:
        nearest = [_bfloat(v) for v in values]
        rest = [_bfloat(v - _float(b)) for v, b in zip(values, nearest, strict=True)]
        parts = [nearest, rest, nearest]
    width = columns // 8  # of a row of one part, in 16 bytes
    for number_of_part, bits in enumerate(parts):
        words = [a | b << 16 for a, b in zip(bits[::2], bits[1::2], strict=True)]
        start = (row * len(parts) + number_of_part) * width + group * (GROUP // 8)
        for i in range(0, len(words), 4):
            w.store(words[i : i + 4], result, start + i // 4, is_there)


def _bfloat(x: Value) -> Value:
    """The bits of the nearest bfloat16, as int32."""
    bits = x.bits_as(_like(x, I32))
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def _float(bfloat: Value) -> Value:
    return (bfloat << 16).bits_as(_like(bfloat, F32))


def _bits(half: Value) -> Value:
    return half.bits_as(_like(half, I16)).to(I32, signed=False)


def _like(x: Value, element: Any) -> Any:
    """The type of x with other elements."""
    count = getattr(x.type, "count", None)
    return element if count is None else vec(element, count)
