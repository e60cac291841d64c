"""GPU kernels for attention of one new token per sequence, over the cached positions it sees.

The positions that a head sees are divided among several warps. A warp divides its positions among
eight groups of four lanes. The four lanes of a group share the D channels of a key and its value,
in chunks of 8.

Each group keeps three running numbers (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018): the largest score so far, the sum of exp(score - largest), and the sum of the
values weighted by exp(score - largest). A warp merges its groups when it ends. A second kernel
merges the warps of a head (Dao et al., "Flash-Decoding for long-context inference", 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phicore.backend.cache_types import TYPES
from phicore.backend.shapes import power_of_two
from phicore_jax.cuda.formats import as_float
from phicore_jax.cuda.warp import LANES, Warp
from phicore_jax.kernels.attention import exp
from phicore_jax.kernels.lang import F16, F32, I16, I32, I64, Value

CACHE_TYPES = ("i16", "f16", "f32")
CHUNK = 8  # consecutive channels that a lane loads
QUAD = 4  # lanes that share a key
KEYS = LANES // QUAD  # keys that a warp reads at once
WARPS = 2048  # enough warps to occupy a GPU
NOTHING = -1e30  # stands for the largest score where no key was seen


@dataclass(frozen=True)
class Shape:
    """The shape of a layer's attention: B, H, K, S and D of the protocol, and the cache type."""

    batch: int
    heads: int
    kv_heads: int
    capacity: int
    dim: int
    cache_type: str

    @property
    def splits(self) -> int:
        """Number of warps that share a head: a power of two, up to 64."""
        wanted = max(1, WARPS // (self.batch * self.heads))
        most = min(64, max(1, self.capacity // (KEYS * self.together)), wanted)
        return power_of_two(most + 1) // 2

    @property
    def combining_warps(self) -> int:
        """Number of warps that `emit_combine` needs: one for each chunk of a head's channels."""
        return self.batch * self.heads * self.dim // CHUNK

    @property
    def chunks(self) -> int:
        """Number of chunks of channels that each lane holds."""
        return self.dim // (CHUNK * QUAD)

    @property
    def together(self) -> int:
        """Number of cache slots that a group of lanes loads at once.

        Heads of more than 128 channels load one slot, since two would not fit into the registers.
        """
        return 2 if self.dim <= 128 else 1


def has_dim(dim: int) -> bool:
    """Return whether the kernels support heads of `dim` channels."""
    return dim % LANES == 0 and dim <= 256


def emit_store(w: Warp, shape: Shape, args: Sequence[Value]) -> None:
    """Write the kernel that rounds new keys and values and stores them; a warp stores one row.

    Args:
        args: Pointers, in this order: new keys (B, K, D), new values (B, K, D), positions (B,),
            cached keys (B, K, S, D), cached values (B, K, S, D). If the cache type has scales,
            the keys' scales (B, K, S) come after the cached keys, and the values' scales after the
            cached values.
    """
    f, s = w.f, shape
    per_row = s.dim // LANES
    count = s.batch * s.kv_heads
    cache = args[3:]
    planes = len(cache) // 2
    with f.when(w.number < 2 * count):
        for which in range(2):
            with f.when((w.number >= count) if which else (w.number < count)):
                row = w.number - which * count
                position = w.uniform(I32, args[2], row // s.kv_heads)
                slot = row * s.capacity + position
                x = [
                    w.load(F32, args[which], w.lane + w.spread(row * s.dim + LANES * i))[0]
                    for i in range(per_row)
                ]
                rows, *scales = cache[which * planes : (which + 1) * planes]
                _store_row(w, s, x, slot, rows, scales)


def _store_row(
    w: Warp, s: Shape, x: list[Value], slot: Value, rows: Value, scales: Sequence[Value]
) -> None:
    f = w.f
    at = w.spread(slot * s.dim) + w.lane
    if s.cache_type == "i16":
        largest, rest = f.absolute(x[0]), x[0] * 0.0
        for more in x[1:]:
            largest, rest = f.larger(largest, f.absolute(more)), rest + more * 0.0
        # A NaN or an infinity makes the scale NaN, as in `cache_types.multiples`.
        most = float(TYPES["i16"].largest)
        scale = w.max(largest) / most + w.sum(rest)
        w.store([scale], scales[0], w.spread(slot), w.lane.equals(0))
        divisor = (scale > 0.0).select(scale, 1.0)
        found = [f.round_even(number / divisor) for number in x]
        found = [(n > most).select(most, n) for n in found]
        found = [(n < -most).select(-most, n) for n in found]
        stored = [(scale > 0.0).select(n, 0.0).to(I32).to(I16) for n in found]
    elif s.cache_type == "f16":
        stored = [number.to(F16) for number in x]
    else:
        stored = x
    for i, number in enumerate(stored):
        w.store([number], rows, at + LANES * i)


def emit_attention(w: Warp, shape: Shape, window: int | None, args: Sequence[Value]) -> None:
    """Write the kernel that computes a head's attention to one of P splits of the positions.

    A warp computes one split. `emit_combine` merges the splits.

    Args:
        window: Number of positions that a token sees, its own included; None for all of them.
        args: Pointers, in this order: scaled queries (B, H, D), positions (B,), the cache as in
            `emit_store`; then the results: weighted sums of values (B, H, P, D), and pairs of the
            largest score and the sum of the exponentials (B, H, P, 2).
    """
    f, s = w.f, shape
    splits, total = s.splits, s.batch * s.heads * s.splits
    query, positions, *cache, sums, stats = args
    planes = len(cache) // 2
    with f.when(w.number < total):
        split, head = w.number % splits, w.number // splits
        batch = head // s.heads
        kv_head = batch * s.kv_heads + (head % s.heads) // (s.heads // s.kv_heads)
        last = w.uniform(I32, positions, batch)
        first = f.i32(0)
        if window is not None:
            first = (last >= window).select(last - (window - 1), 0)
        quad, group = w.lane & (QUAD - 1), w.lane >> 2
        q = _chunks(w, s, query, w.spread(head), quad, "f32")
        zero = w.spread(f.f32(0.0))
        largest = f.variable(w.spread(f.f32(NOTHING)))
        power = f.variable(zero)
        values = [f.variable(zero) for _ in q]
        step = splits * KEYS
        start = (first + split * KEYS).to(I64)
        with f.loop(last.to(I64) + 1, start, step * s.together) as at:
            keys = []
            for i in range(s.together):
                position = w.spread(at.to(I32) + i * step) + group
                is_seen = position <= w.spread(last)
                row = w.spread(kv_head * s.capacity) + is_seen.select(position, w.spread(last))
                numbers, *scales = cache[:planes]
                k = _chunks(w, s, numbers, row, quad, s.cache_type)
                k_scale = [w.load(F32, plane, row)[0] for plane in scales]
                numbers, *scales = cache[planes:]
                v = _chunks(w, s, numbers, row, quad, s.cache_type)
                v_scale = [w.load(F32, plane, row)[0] for plane in scales]
                keys.append((is_seen, k, k_scale, v, v_scale))
            for is_seen, k, k_scale, v, v_scale in keys:
                score = q[0] * k[0]
                for a, b in zip(q[1:], k[1:], strict=True):
                    score = f.fma(a, b, score)
                score = w.sum(score, (2, 1))
                for factor in k_scale:
                    score = score * factor
                score = is_seen.select(score, NOTHING)
                new = f.larger(largest.value, score)  # ignores NaN; the weight is NaN then
                correction = exp(f, largest.value - new)
                weight = is_seen.select(exp(f, score - new), 0.0)
                largest.value = new
                power.value = f.fma(power.value, correction, weight)
                for factor in v_scale:
                    weight = weight * factor
                for value, b in zip(values, v, strict=True):
                    value.value = f.fma(weight, b, value.value * correction)
        _merge(w, s, head * splits + split, largest.value, power.value, values, (sums, stats))


def _chunks(w: Warp, s: Shape, plane: Value, row: Value, quad: Value, row_type: str) -> list[Value]:
    """Load the channels of a lane as float32: chunk `QUAD * i + quad` of a row for each i."""
    found = []
    for i in range(s.chunks):
        chunk = row * (s.dim // CHUNK) + quad + QUAD * i
        if row_type == "f32":
            found += w.load(F32, plane, chunk * 2, 4) + w.load(F32, plane, chunk * 2 + 1, 4)
            continue
        for word in w.load(I32, plane, chunk, 4):
            if row_type == "i16":
                found += [(word << 16).sar(16).to(F32), word.sar(16).to(F32)]
            else:
                found += [as_float(word.to(I16)), as_float((word >> 16).to(I16))]
    return found


def _merge(
    w: Warp,
    s: Shape,
    place: Value,
    largest: Value,
    power: Value,
    values: Sequence[Any],
    results: tuple[Value, Value],
) -> None:
    """Merge the groups of a warp, and store the sums and statistics of its split at `place`."""
    f = w.f
    sums, stats = results
    groups = (16, 8, 4)
    of_all = w.max(largest, groups)
    factor = exp(f, largest - of_all)
    power = w.sum(power * factor, groups)
    merged = [w.sum(value.value * factor, groups) for value in values]
    group, quad = w.lane >> 2, w.lane & (QUAD - 1)
    for i in range(s.chunks):  # each group stores one channel of a chunk
        chosen = merged[CHUNK * i]
        for channel in range(1, CHUNK):
            chosen = group.equals(channel).select(merged[CHUNK * i + channel], chosen)
        at = w.spread(place * s.dim) + (quad + QUAD * i) * CHUNK + group
        w.store([chosen], sums, at)
    at = w.spread(place * 2)
    w.store([of_all], stats, at, w.lane.equals(0))
    w.store([power], stats, at + 1, w.lane.equals(0))


def emit_combine(w: Warp, shape: Shape, args: Sequence[Value]) -> None:
    """Write the kernel that merges the splits of `emit_attention`.

    A warp computes a chunk of channels of a head. Its lanes are four groups, each of which adds
    every fourth split.

    Args:
        args: Pointers, in this order: the two results of `emit_attention`, and the result
            (B, H, D).
    """
    f, s = w.f, shape
    sums, stats, result = args
    chunks = s.dim // CHUNK
    with f.when(w.number < s.combining_warps):
        head = w.number // chunks
        first = w.spread(head * s.splits)
        largest, powers = [], []
        for start in range(0, s.splits, LANES):  # each lane reads one split, or two
            split = w.lane + start
            is_there = split < s.splits
            at = (first + is_there.select(split, 0)) * 2
            largest.append(is_there.select(w.load(F32, stats, at)[0], NOTHING))
            powers.append(is_there.select(w.load(F32, stats, at + 1)[0], 0.0))
        group, channel = w.lane >> 3, w.spread(w.number % chunks * CHUNK) + (w.lane & (CHUNK - 1))
        parts = []
        for start in range(0, s.splits, LANES // CHUNK):
            split = group + start
            is_there = split < s.splits
            at = first + is_there.select(split, 0)
            (score,), (part,) = w.load(F32, stats, at * 2), w.load(F32, sums, at * s.dim + channel)
            parts.append((is_there.select(score, NOTHING), part))
        of_all = largest[0]
        for more in largest[1:]:
            of_all = f.larger(of_all, more)
        of_all = w.max(of_all)
        power = value = w.spread(f.f32(0.0))
        for score, a in zip(largest, powers, strict=True):
            power = f.fma(exp(f, score - of_all), a, power)
        for score, part in parts:
            value = f.fma(exp(f, score - of_all), part, value)
        value = w.sum(value, (16, 8)) / w.sum(power)
        w.store([value], result, w.spread(head * s.dim) + channel, w.lane < CHUNK)
