"""GPU kernels for products of activations with a quantized matrix.

With a few rows of activations, the weights are multiplied as they are stored. A lane takes a group
of 32 weights at a time and loads its codes up to 16 bytes at once. A warp takes several rows of the
matrix, to use each loaded activation several times.

The activations are quantized to integers first: within a group they are multiples of 1 / 32512 of
the largest absolute value. An integer is stored as two signed bytes, because a GPU multiplies four
bytes in one instruction (`dp4a`); to expand four weights to float32 and multiply them would take
eight. Sums within a group are exact. The result is within 3e-5 of float64.

With many rows of activations, the matrix is expanded part by part to 16-bit floats, which XLA
multiplies on tensor cores. The sum of two bfloat16 represents a weight to within 2**-17, and one
float16 represents it to within 2**-11.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from phicore_jax.cuda.formats import GROUP, Format
from phicore_jax.cuda.warp import LANES, Warp
from phicore_jax.kernels.attention import exp
from phicore_jax.kernels.lang import F16, F32, I8, I16, I32, Value, suffix, vec

UNROLLED = 8
"""The most products of a warp that are unrolled over the columns, so that the loads of several
columns are on the way at once. More would not fit into the registers."""
LOADED = 24
"""The number of vectors of a row that a lane loads before it uses the first."""
LARGEST = 127 * 256  # the largest integer: its upper and lower byte are both signed


def integers(groups: int) -> list[tuple[tuple[int, ...], Any]]:
    """Return the shapes and dtypes of the results of `emit_quantize` for this many groups."""
    return [((4, groups, 16), np.int8), ((groups,), np.float32), ((groups, 2), np.int32)]


def emit_quantize(w: Warp, groups: int, args: Sequence[Value]) -> None:
    """Write the kernel that quantizes activations; a warp takes one group, a lane one number.

    Args:
        groups: G, the number of groups in all rows together.
        args: Pointers, in this order: the activations (G, 32) float32; then the results, which are
            bytes (4, G, 16), the unit of each group (G,), and the sum of each half of a group
            (G, 2). The bytes are the upper ones of the first and of the second half of each group,
            then the lower ones.
    """
    activations, *results = args
    with w.f.when(w.number < groups):
        (x,) = w.load(F32, activations, w.spread(w.number * GROUP) + w.lane)
        _store_integers(w, groups, x, results)


def emit_quantize_normed(
    w: Warp, groups: int, columns: int, eps: float, args: Sequence[Value]
) -> None:
    """Write the kernel that applies RMSNorm and quantizes the result, without storing it as floats.

    A warp takes one group. It computes the mean square of the row itself, since reading the row
    again is faster than the launch of another kernel.

    Args:
        groups: The number of groups in all rows together.
        columns: E, the length of a row.
        args: Pointers, in this order: the rows (M, E), the norm's weight (E,), and the results of
            `emit_quantize`.
    """
    f = w.f
    rows, weight, *results = args
    with f.when(w.number < groups):
        groups_of_row = columns // GROUP
        row, group = w.number // groups_of_row, w.number % groups_of_row
        column = w.spread(group * GROUP) + w.lane
        (x,) = w.load(F32, rows, w.spread(row * columns) + column)
        (factor,) = w.load(F32, weight, column)
        together = 4 if columns % (4 * LANES) == 0 else 1
        totals = [w.spread(f.f32(0.0))] * together  # several, so that one need not wait for another
        vectors = columns // together
        for first in range(0, vectors, LOADED * LANES):  # many loads are on the way at once
            starts = range(first, min(first + LOADED * LANES, vectors), LANES)
            at = [w.spread(row * vectors + start) + w.lane for start in starts]
            for numbers in [w.load(F32, rows, i, together) for i in at]:
                totals = [f.fma(n, n, total) for n, total in zip(numbers, totals, strict=True)]
        total, *others = totals
        for more in others:
            total = total + more
        mean = w.sum(total) * (1 / columns)
        root = f.call(f"llvm.sqrt{suffix(mean.type)}", mean.type, mean + eps)
        _store_integers(w, groups, factor * (x / root), results)


def emit_quantize_gated(w: Warp, groups: int, columns: int, args: Sequence[Value]) -> None:
    """Write the kernel that applies SwiGLU and quantizes the result, without storing it as floats.

    A warp takes one group.

    Args:
        groups: The number of groups in all rows together.
        columns: F, the length of a row of the result.
        args: Pointers, in this order: rows (M, 2F), each with the F gates first; and the results
            of `emit_quantize`.
    """
    f = w.f
    gate_up, *results = args
    with f.when(w.number < groups):
        groups_of_row = columns // GROUP
        row, group = w.number // groups_of_row, w.number % groups_of_row
        at = w.spread(row * (2 * columns) + group * GROUP) + w.lane
        (gate,), (up,) = w.load(F32, gate_up, at), w.load(F32, gate_up, at + columns)
        # exp(-abs(gate)) cannot overflow
        power = exp(f, f.like(gate, 0.0) - f.absolute(gate))
        share = (gate < 0.0).select(power, 1.0) / (power + 1.0)
        _store_integers(w, groups, gate * share * up, results)


def _store_integers(w: Warp, groups: int, x: Value, results: Sequence[Value]) -> None:
    """Quantize the warp's group, of which each lane holds one number x, and store the results."""
    f = w.f
    both, units, sums = results
    group = w.spread(w.number)
    largest = w.max(f.absolute(x))
    unit = (largest > 1e-30).select(largest, 1.0) * (1 / LARGEST)
    integer = f.round_even(x / unit).to(I32)
    upper = (integer + 128) >> 8
    at = (w.lane >> 4) * (16 * groups) + group * 16 + (w.lane & 15)
    w.store([upper.to(I8)], both, at)
    w.store([(integer - (upper << 8)).to(I8)], both, at + GROUP * groups)
    # A NaN or an infinity would be lost in an integer, so it makes the unit NaN.
    w.store([unit + w.sum(x * 0.0)], units, group, w.lane.equals(0))
    half = w.sum(integer, (8, 4, 2, 1))
    w.store([half], sums, group * 2 + (w.lane >> 4), (w.lane & 15).equals(0))


def rows_of_warp(m: int) -> int:
    """Return how many rows of the matrix a warp takes for m rows of activations.

    The more it takes, the more often it uses each activation that it loads, and the fewer warps
    there are to hide the time that loads take. These numbers were the fastest on an H200.
    """
    return 2 if m <= 2 else 4


def warps_of(rows: int, m: int) -> int:
    """Return how many warps multiply m rows of activations by a matrix of this many rows."""
    return -(-rows // rows_of_warp(m))


def emit_product(
    w: Warp, fmt: Format, shape: tuple[int, int], m: int, args: Sequence[Value]
) -> None:
    """Write the kernel that computes y (M, N) = x (M, K) @ weight.T.

    Args:
        shape: N, K.
        m: M.
        args: Pointers, in this order: the results of `emit_quantize` for x, the planes of the
            weight, and y (M, N) float32.
    """
    count = rows_of_warp(m)
    numbers = [w.number * count + r for r in range(count)]
    rows_of_x = [w.f.i32(i) for i in range(m)]
    _product(w, fmt, shape, numbers, w.f.i32(0), m, rows_of_x, args)


def emit_expert_product(
    w: Warp, fmt: Format, shape: tuple[int, int], m: int, args: Sequence[Value]
) -> None:
    """Write the kernel that multiplies each row of x by its expert's matrix.

    Args:
        shape: N, K of each expert's matrix; the matrices are stacked along the rows.
        m: M.
        args: Pointers, in this order: the number of each row's expert (M,) int32, then the
            pointers that `emit_product` takes.
    """
    experts, *others = args
    count, warps = rows_of_warp(1), warps_of(shape[0], 1)  # warps for each row of x
    with w.f.when(w.number < m * warps):
        row_of_x = w.number // warps
        numbers = [w.number % warps * count + r for r in range(count)]
        first = w.uniform(I32, experts, row_of_x) * shape[0]
        _product(w, fmt, shape, numbers, first, m, [row_of_x], others)


def _product(
    w: Warp,
    fmt: Format,
    shape: tuple[int, int],
    numbers: Sequence[Value],
    first: Value,
    m: int,
    rows_of_x: Sequence[Value],
    args: Sequence[Value],
) -> None:
    """Write the product of a warp's rows of the weight and some rows of x.

    Args:
        numbers: The rows of the matrix that the warp takes.
        first: The row of the planes at which the matrix begins.
        m: The number of rows that x has.
        rows_of_x: The rows of x, whose products are stored in the same rows of y.
        args: The pointers that `emit_product` takes.
    """
    f = w.f
    rows, columns = shape
    groups = columns // GROUP
    activations, units, sums, *planes, y = args
    # Beyond the last row a warp computes that row again, and does not store it.
    row = [w.spread(first + (n < rows).select(n, rows - 1)) for n in numbers]
    total = [[f.variable(w.spread(f.f32(0.0))) for _ in rows_of_x] for _ in numbers]

    def add(start: Value, *, is_partial: bool) -> None:
        """Add the products of LANES groups, or perhaps of fewer at the end of the rows."""
        group = w.lane + w.spread(start)
        is_there = group < groups
        if is_partial:
            group = is_there.select(group, groups - 1)
        weights = [fmt.read(w, planes, r, group, groups) for r in row]
        for i, row_of_x in enumerate(rows_of_x):
            at = group + w.spread(row_of_x * groups)
            words = []
            for part in range(4):  # neighbouring lanes load neighbouring words
                words += w.load(I32, activations, at + part * m * groups, 4)
            (unit,) = w.load(I32, units, at)
            unit = unit.bits_as(_like(unit, F32))
            halves = w.load(I32, sums, at, 2)
            for r in range(len(numbers)):
                added = weights[r].times(w, words, halves) * unit
                if is_partial:
                    added = is_there.select(added, 0.0)
                total[r][i].value = total[r][i].value + added

    if len(rows_of_x) * len(numbers) <= UNROLLED:
        for start in range(0, groups, LANES):
            add(f.i32(start), is_partial=start + LANES > groups)
    else:
        with f.loop(groups, step=LANES) as begin:
            add(begin.to(I32), is_partial=groups % LANES > 0)
    for r, number in enumerate(numbers):
        for i, row_of_x in enumerate(rows_of_x):
            is_first = w.lane.equals(0) & w.spread(number < rows)
            w.store([w.sum(total[r][i].value)], y, w.spread(number + row_of_x * rows), is_first)


def emit_expand(
    w: Warp,
    fmt: Format,
    columns: int,
    part: tuple[int, int],
    is_fast: bool,
    args: Sequence[Value],
) -> None:
    """Write the kernel that expands some rows of a matrix to 16-bit floats; a warp takes 32 groups.

    Args:
        columns: K.
        part: The first row to expand, and the number of rows.
        is_fast: Expand to float16 (rows, K). Otherwise expand to bfloat16 (rows, 3, K): the
            bfloat16 nearest to the weight, the one nearest to the remainder, and the first again.
        args: Pointers, in this order: the planes of the weight, the result.
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
    """Write the kernel that expands some rows of one expert's matrix; see `emit_expand`.

    Args:
        shape: N, K of each expert's matrix; the matrices are stacked along the rows.
        args: Pointers, in this order: the number of the expert (1,) int32, then the pointers that
            `emit_expand` takes.
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
    width = columns // 8  # a row of one part, in units of 16 bytes
    for number_of_part, bits in enumerate(parts):
        words = [a | b << 16 for a, b in zip(bits[::2], bits[1::2], strict=True)]
        start = (row * len(parts) + number_of_part) * width + group * (GROUP // 8)
        for i in range(0, len(words), 4):
            w.store(words[i : i + 4], result, start + i // 4, is_there)


def _bfloat(x: Value) -> Value:
    """Round float32 to the nearest bfloat16, and return its 16 bits as int32."""
    bits = x.bits_as(_like(x, I32))
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def _float(bfloat: Value) -> Value:
    return (bfloat << 16).bits_as(_like(bfloat, F32))


def _bits(half: Value) -> Value:
    return half.bits_as(_like(half, I16)).to(I32, signed=False)


def _like(x: Value, element: Any) -> Any:
    """Return the type of x with another element type: a scalar, or a vector of as many lanes."""
    count = getattr(x.type, "count", None)
    return element if count is None else vec(element, count)
