"""Products of a few rows with a quantized matrix, on a card, weights as they are in memory.

A lane takes a group of 32 weights at a time, whose codes it loads 16 bytes at once; a warp takes
two rows of the matrix, so that activations that were loaded are used more than once. These are
integers: in each group multiples of 1 / 32512 of the largest, as two signed bytes, since a card
multiplies four bytes in one instruction (`dp4a`) and would need eight to expand and multiply four
weights in float32. Sums of a group are exact; the result is within 3e-5 of float64.
"""

from __future__ import annotations

from collections.abc import Sequence

from phicore_jax.cuda.formats import GROUP, Format
from phicore_jax.cuda.warp import LANES, Warp
from phicore_jax.kernels.lang import F32, I8, I32, Value

LARGEST = 127 * 256  # both bytes of a multiple are signed


def emit_quantize(w: Warp, groups: int, args: Sequence[Value]) -> None:
    """What a warp does to make integers of activations: a group, a lane for each number.

    Args:
        groups: G, of all rows.
        args: Pointers to the activations, (G, 32) float32, and to what comes of them: bytes
            (G, 2, 32) int8, the upper ones of a group and then the lower ones; the units of the
            groups, (G,) float32; the sums of each half of them, (G, 2) int32.
    """
    f = w.f
    activations, both, units, sums = args
    with f.when(w.number < groups):
        group = w.spread(w.number)
        (x,) = w.load(F32, activations, group * GROUP + w.lane)
        largest = w.max(f.absolute(x))
        unit = (largest > 1e-30).select(largest, 1.0) * (1 / LARGEST)
        integer = f.round_even(x / unit).to(I32)
        upper = (integer + 128) >> 8
        byte = group * (2 * GROUP) + w.lane
        w.store(upper.to(I8), both, byte)
        w.store((integer - (upper << 8)).to(I8), both, byte + GROUP)
        # a sum that is not finite must not vanish in an integer
        w.store(unit + w.sum(x * 0.0), units, group, w.lane.equals(0))
        half = w.sum(integer, (8, 4, 2, 1))
        w.store(half, sums, group * 2 + (w.lane >> 4), (w.lane & 15).equals(0))


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
        args: Pointers: what `quantize` makes of x, the planes of the weight, y.
    """
    f = w.f
    rows, columns = shape
    groups = columns // GROUP
    activations, units, sums, *planes, y = args
    count = rows_of_warp(m)
    numbers = [w.number * count + r for r in range(count)]
    # beyond the last row it is computed again, and not stored
    row = [w.spread((n < rows).select(n, rows - 1)) for n in numbers]
    total = [[w.spread(f.f32(0.0))] * m for _ in range(count)]
    for start in range(0, groups, LANES):
        group, is_there = w.lane + start, None
        if start + LANES > groups:
            is_there = group < groups
            group = is_there.select(group, groups - 1)
        weights = [fmt.read(w, planes, r, group, groups) for r in row]
        for i in range(m):
            at = group + i * groups
            words = [q for part in range(4) for q in w.load(I32, activations, at * 4 + part, 4)]
            (unit,) = w.load(I32, units, at)
            unit = unit.bits_as(total[0][i].type)
            halves = w.load(I32, sums, at, 2)
            for r in range(count):
                added = weights[r].times(w, words, halves) * unit
                if is_there is not None:
                    added = is_there.select(added, 0.0)
                total[r][i] = total[r][i] + added
    for r in range(count):
        for i in range(m):
            is_first = w.lane.equals(0) & w.spread(numbers[r] < rows)
            w.store(w.sum(total[r][i]), y, w.spread(numbers[r] + i * rows), is_first)
