"""Kernels for the cache of keys and values, and for attention over it.

The cache holds float32 or float16 numbers, integers with a float32 scale for each head and
position, or bytes with a float16 scale for every 32 channels.

Attention reads only the positions that a token sees. It processes them in blocks and keeps a
running maximum and sum (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018;
Dao et al., "FlashAttention", 2022), so its memory does not grow with the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from llvmlite import ir

from phicore.backend.cache_types import CacheType
from phicore.backend.shapes import BLOCK_OF_SLOTS
from phicore_jax.cache import ROW_TYPES
from phicore_jax.kernels import ffi, matrix, pool
from phicore_jax.kernels.ffi import Buffer
from phicore_jax.kernels.lang import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    PTR,
    VOID,
    Function,
    Module,
    Operand,
    Value,
    Variable,
    sums_in_pairs,
    vec,
)

FLOATS = vec(F32)
LOWEST = -1e30  # below every score
BLOCK = BLOCK_OF_SLOTS  # slots that are processed together
VECTOR = 4 * LANES  # bytes of a vector
CACHE_TYPES = ("f32", "f16", "i16", "i24", "q8_0")
BLOCK_OF_Q8_0 = ROW_TYPES["q8_0"].group or 0  # channels that share a scale


@dataclass(frozen=True)
class Rows:
    """Storage of a head's numbers at a position: `f32`, `f16`, `i16`, `i24` or `q8_0`.

    Integers (`i16`, `i24`) are multiples of the row's scale. A row of `i24` holds the upper 16 bits
    of all channels and then the rest of each channel, a signed byte. A row of `q8_0` holds a byte
    for each channel and then the float16 scales.
    """

    type: str
    dim: int

    @property
    def kind(self) -> CacheType:
        return ROW_TYPES[self.type]

    @property
    def has_scales(self) -> bool:
        """Say whether each row has one scale, which a separate array holds."""
        return self.kind.scale_dtype is not None and self.kind.group is None

    @property
    def largest(self) -> float:
        return float(self.kind.largest)

    @property
    def bytes(self) -> int:
        """Number of bytes of a row, without a scale in a separate array."""
        return (
            self.dim * self.kind.bits // 8 if self.has_scales else self.kind.bytes_of_row(self.dim)
        )

    def pieces(self) -> list[tuple[int, int]]:
        """Split a row into vectors: (first channel, number of channels); the last may be short."""
        return [(d, min(LANES, self.dim - d)) for d in range(0, self.dim, LANES)]

    def load(self, f: Function, row: Value, d: int, lanes: int) -> Value:
        """Load channels of a row as float32, not multiplied by a scale in a separate array."""
        if self.type == "f32":
            return f.load(vec(F32, lanes), row, 4 * d)
        if self.type == "q8_0":
            scale = f.load(I16, row, self._scale_at(d)).splat(lanes)
            return f.load(vec(I8, lanes), row, d).to(F32) * f.target.half_to_float(scale)
        bits = f.load(vec(I16, lanes), row, 2 * d)
        if self.type == "f16":
            return f.target.half_to_float(bits)
        if self.type == "i16":
            return bits.to(F32)
        assert self.type == "i24", "CACHE_TYPES has the types of these kernels"
        low = f.load(vec(I8, lanes), row, 2 * self.dim + d)
        return ((bits.to(I32) << 8) + low.to(I32)).to(F32)

    def store(self, f: Function, x: Sequence[Value], row: Value, scale_at: Value) -> None:
        """Store a row, given as the vectors of `pieces`, and its separate scale, if it has one."""
        if self.type == "q8_0":
            self._store_blocks(f, x, row)
            return
        if self.has_scales:
            largest = f.f32(0.0)
            for v in x:
                largest = f.maximum(largest, f.maximum_of_lanes(f.absolute(v)))
            is_none = largest <= 1e-30  # false for NaN, which must reach the result
            f.store(is_none.select(0.0, largest * (1 / self.largest)), scale_at)
            inverse = is_none.select(0.0, f.f32(self.largest) / largest)
            x = [f.round_even(v * inverse.splat(v.type.count)).to(I32) for v in x]
        for v, (d, _) in zip(x, self.pieces(), strict=True):
            if self.type == "f32":
                f.store(v, row, 4 * d)
            elif self.type == "f16":
                f.store(f.target.float_to_half(v), row, 2 * d)
            elif self.type == "i16":
                f.store(v.to(I16), row, 2 * d)
            else:
                assert self.type == "i24", "CACHE_TYPES has the types of these kernels"
                f.store(((v + 128).sar(8)).to(I16), row, 2 * d)
                f.store(v.to(I8), row, 2 * self.dim + d)

    def _scale_at(self, d: int) -> int:
        return self.dim + 2 * (d // BLOCK_OF_Q8_0)

    def _store_blocks(self, f: Function, x: Sequence[Value], row: Value) -> None:
        together, most = BLOCK_OF_Q8_0 // LANES, self.kind.largest
        for i in range(0, len(x), together):
            block = x[i : i + together]
            largest = f.f32(0.0)
            for v in block:
                largest = f.maximum(largest, f.maximum_of_lanes(f.absolute(v)))
            half = f.target.float_to_half((largest * (1 / self.largest)).splat())
            f.store(half.lane(0), row, self._scale_at(LANES * i))
            scale = f.target.half_to_float(half)
            inverse = (scale > 0.0).select(f.like(scale, 1.0) / scale, 0.0)
            for j, v in enumerate(block):
                code = f.round_even(v * inverse).to(I32)
                # a tiny scale may be rounded down so much that codes exceed the largest
                code = (code > most).select(most, code)
                code = (code < -most).select(-most, code)
                f.store(code.to(I8), row, LANES * (i + j))


@dataclass(frozen=True)
class Cache:
    """The storage of keys and of values, which a kernel is specialized for."""

    keys: Rows
    values: Rows

    @property
    def name(self) -> str:
        return f"{self.keys.type}-{self.values.type}-{self.dim}"

    @property
    def dim(self) -> int:
        return self.keys.dim

    @property
    def has_scales(self) -> bool:
        return self.keys.has_scales


def exp(f: Function, x: Value) -> Value:
    """Compute e to the power of x, for x <= 0, to within 2 units in the last place.

    The result is 2**n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes, expf.c).
    """
    is_tiny = x < -87.0  # the result is 0
    x = is_tiny.select(-87.0, x)
    n = f.round_even(x * (1 / log(2)))
    r = f.fma(n, f.like(x, -0.693359375), x)
    r = f.fma(n, f.like(x, 2.12194440e-4), r)
    p = f.like(x, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = f.fma(p, r, f.like(x, c))
    p = f.fma(p * r, r, r + 1.0)
    return is_tiny.select(0.0, p * ((n.to(I32) + 127) << 23).bits_as(x.type))


# ---- storing -------------------------------------------------------------------------------


def emit_store(module: Module, cache: Cache) -> None:
    """Write the handler `store`, which stores new keys and values in a cache, in place.

    Its arguments are keys and values (B, K, T, D) float32, positions (B, T) int32, and the arrays
    of the cache: the rows (B, K, S, D) of keys and, if there are any, their scales (B, K, S), then
    the rows and scales of values. The arrays of the cache are also its results.
    """
    pool.emit(module)
    count = 2 if cache.has_scales else 1

    def head(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        """Store all tokens of a head. The chunks are the heads of keys, then those of values."""
        positions = f.load(PTR, args, 0)
        heads, tokens, capacity, all_heads = (f.load(I64, args, 8 * i) for i in range(1, 5))
        head, is_value = chunk % all_heads, chunk // all_heads
        own = f.offset(args + 40, is_value * 24)
        x, rows, scales = (f.load(PTR, own, 8 * i) for i in range(3))
        with f.loop(tokens) as t:
            source = f.offset(x, (head * tokens + t) * (4 * cache.dim))
            at = f.load(I32, f.offset(positions, (head // heads * tokens + t) * 4)).to(I64)
            number = head * capacity + at
            with f.when((at >= 0) & (at < capacity)):
                new = [f.load(vec(F32, n), source, 4 * d) for d, n in cache.keys.pieces()]
                scale_at = f.offset(scales, number * 4)
                with f.if_else(is_value.equals(0)) as branches:
                    for kind, branch in zip((cache.keys, cache.values), branches, strict=True):
                        with branch:
                            kind.store(f, new, f.offset(rows, number * kind.bytes), scale_at)

    job = module.function("store_head", [PTR, I64, I64], head, exported=False)

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        keys, values, positions = args[:3]  # the others share their memory with the results
        heads, tokens, capacity = keys.dim(1), keys.dim(2), rets[0].dim(2)
        all_heads = keys.dim(0) * heads
        own = []
        for i, x in enumerate((keys, values)):
            kept = rets[i * count : (i + 1) * count]
            own += [x.data, kept[0].data, kept[-1].data]
        packed = f.pack(positions.data, heads, tokens, capacity, all_heads, *own)
        f.call("pool_run", VOID, state, f.address_of(job), packed, all_heads * 2)

    ffi.emit_handler(module, "store", 3 + 2 * count, 2 * count, call)


# ---- attention -----------------------------------------------------------------------------

# Arguments of the jobs, in 64-bit words.
Q, POSITIONS, KEYS, VALUES, KEY_SCALES, VALUE_SCALES, OUT, WINDOW = range(8)
HEADS, KV_HEADS, TOKENS, CAPACITY = range(8, 12)


def _scale(f: Function, cache: Cache, scales: Value, number: Value) -> Value | None:
    return f.load(F32, f.offset(scales, number * 4)) if cache.has_scales else None


def _first_seen(position: Value, window: Value) -> Value:
    """Return the first position that a token sees."""
    start = position - window + 1
    return (start < 0).select(0, start)


def _start_of_block(position: Value) -> Value:
    """Return the start of a position's block.

    Blocks start at multiples of 32, whatever a token sees: the sums of a token then do not depend
    on the other tokens of its chunk.
    """
    return position & -BLOCK


def _emit_one_token(module: Module, cache: Cache, group: int) -> ir.Function:
    """Write a job for one token; a chunk is the `group` heads of queries that share a key head."""
    pieces = cache.keys.pieces()
    queries = range(group)

    def body(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        q, positions, keys, values, key_scales, value_scales, out = (
            f.load(PTR, args, 8 * i) for i in range(7)
        )
        window, kv_heads, capacity = (
            f.load(I64, args, 8 * i) for i in (WINDOW, KV_HEADS, CAPACITY)
        )
        position = f.load(I32, f.offset(positions, chunk // kv_heads * 4)).to(I64)
        start = _first_seen(position, window)
        q = f.offset(q, chunk * (group * 4 * cache.dim))
        out = f.offset(out, chunk * (group * 4 * cache.dim))
        scores = f.buffer(group * BLOCK * 4)
        highest = [f.variable(f.f32(LOWEST)) for _ in queries]
        sums = [f.variable(f.zeros(FLOATS)) for _ in queries]
        found = [[f.variable(f.zeros(vec(F32, n))) for _, n in pieces] for _ in queries]
        with f.loop(position + 1, start=_start_of_block(start), step=BLOCK) as first:
            left = position + 1 - first
            count = (left < BLOCK).select(left, BLOCK)
            unseen = start - first
            unseen = (unseen > 0).select(unseen, 0)  # above 0 in the first block only
            for r in queries:
                for i in range(BLOCK // LANES):
                    f.store(f.like(f.zeros(FLOATS), LOWEST), scores, (r * BLOCK + i * LANES) * 4)
            with f.loop(count, start=unseen) as j:
                number = chunk * capacity + first + j
                row = f.offset(keys, number * cache.keys.bytes)
                matrix.prefetch(f, row, cache.keys.bytes)
                key = [cache.keys.load(f, row, d, n) for d, n in pieces]
                scale = _scale(f, cache, key_scales, number)
                for r in queries:
                    total = _dot(
                        f,
                        [
                            f.load(k.type, q, (r * cache.dim + d) * 4)
                            for k, (d, _) in zip(key, pieces, strict=True)
                        ],
                        key,
                    )
                    score = total if scale is None else total * scale
                    f.store(score, f.offset(scores + r * BLOCK * 4, j * 4))
            for r in queries:
                at = [(r * BLOCK + i * LANES) * 4 for i in range(BLOCK // LANES)]
                block = [f.load(FLOATS, scores, a) for a in at]
                largest = block[0]
                for b in block[1:]:
                    largest = f.maximum(largest, b)
                new = f.maximum(highest[r].value, f.maximum_of_lanes(largest))
                factor = exp(f, (highest[r].value - new).splat(LANES))
                highest[r].value = new
                total = sums[r].value * factor
                for b, a in zip(block, at, strict=True):
                    # where the token sees no position, the score is LOWEST and p is 0
                    p = (b > LOWEST).select(exp(f, b - new.splat()), f.zeros(FLOATS))
                    total = total + p
                    f.store(p, scores, a)
                sums[r].value = total
                for so_far, (_, n) in zip(found[r], pieces, strict=True):
                    so_far.value = so_far.value * factor.lane(0).splat(n)
            with f.loop(count, start=unseen) as j:
                number = chunk * capacity + first + j
                row = f.offset(values, number * cache.values.bytes)
                matrix.prefetch(f, row, cache.values.bytes)
                value = [cache.values.load(f, row, d, n) for d, n in pieces]
                scale = _scale(f, cache, value_scales, number)
                for r in queries:
                    p = f.load(F32, f.offset(scores + r * BLOCK * 4, j * 4))
                    p = p if scale is None else p * scale
                    for so_far, v in zip(found[r], value, strict=True):
                        so_far.value = f.fma(p.splat(v.type.count), v, so_far.value)
        for r in queries:
            inverse = f.f32(1.0) / f.sum_of_lanes(sums[r].value)
            for so_far, (d, n) in zip(found[r], pieces, strict=True):
                f.store(so_far.value * inverse.splat(n), out, (r * cache.dim + d) * 4)

    return module.function("one_token", [PTR, I64, I64], body, exported=False)


def _dot(f: Function, x: Sequence[Value], y: Sequence[Value]) -> Value:
    """Return the dot product of rows given as vectors of 16 channels; the last may be shorter."""
    whole: Value | None = None
    rest: Value | None = None
    for a, b in zip(x, y, strict=True):
        if a.type.count < LANES:
            rest = f.sum_of_lanes(a * b)
        else:
            whole = a * b if whole is None else f.fma(a, b, whole)
    total = None if whole is None else f.sum_of_lanes(whole)
    if total is None:
        assert rest is not None
        return rest
    return total if rest is None else total + rest


KEYS_TOGETHER, CHANNELS_TOGETHER = 4, 4


def _emit_many_tokens(module: Module, cache: Cache) -> ir.Function:
    """Write a job for many tokens; a chunk is 16 tokens of a head of queries, one in each lane."""

    def body(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        job = _ManyTokens(f, cache, args, chunk)
        with f.loop(job.end, start=_start_of_block(job.start), step=BLOCK) as first:
            job.add_block(first)
        job.finish()

    return module.function("many_tokens", [PTR, I64, I64], body, exported=False)


@dataclass(frozen=True)
class _Block:
    """Positions that are processed together, and which of them 16 tokens see.

    Attributes:
        first: The first position, a multiple of 32; the other attributes count from it.
        start, end: The positions that any of the tokens sees.
        all_start, all_end: The positions that all of the tokens see.
    """

    first: Value
    start: Value
    end: Value
    all_start: Value
    all_end: Value


class _ManyTokens:
    """The attention of 16 tokens to the positions that they see, block by block.

    Each lane computes the numbers that `_emit_one_token` computes for its token, in the same order.

    Attributes:
        start: The first position that any of the tokens sees.
        end: The position after the last that any of them sees.
    """

    def __init__(self, f: Function, cache: Cache, args: Value, chunk: Value) -> None:
        self.f, self.cache, self.dim = f, cache, cache.dim
        self.channels = -(-self.dim // CHANNELS_TOGETHER) * CHANNELS_TOGETHER
        self.row_bytes = 4 * self.channels
        q, positions, self.keys, self.values, self.key_scales, self.value_scales, self.out = (
            f.load(PTR, args, 8 * i) for i in range(7)
        )
        window, heads, kv_heads, self.tokens, capacity = (
            f.load(I64, args, 8 * i) for i in (WINDOW, HEADS, KV_HEADS, TOKENS, CAPACITY)
        )
        blocks = (self.tokens + (LANES - 1)) // LANES
        head, block = chunk // blocks, chunk % blocks
        # later blocks see more positions; they come first, so that all threads end together
        self.first_token = (blocks - 1 - block) * LANES
        self.first_row = head * self.tokens
        sequence, h = head // heads, head % heads
        self.first_slot = (sequence * kv_heads + h // (heads // kv_heads)) * capacity
        self.queries, self.result = (f.buffer(VECTOR * self.channels) for _ in range(2))
        self.weights, self.totals = f.buffer(VECTOR * BLOCK), f.buffer(VECTOR * LANES)
        self.rows = f.buffer(self.row_bytes * BLOCK)
        self.highest = f.variable(f.like(f.zeros(FLOATS), LOWEST))
        for buffer, count in ((self.result, self.channels), (self.totals, LANES)):
            for i in range(count):
                f.store(f.zeros(FLOATS), buffer, VECTOR * i, align=64)
        self.place = self._load_queries(q, f.offset(positions, sequence * self.tokens * 4))
        # a lane sees the positions up to `place` and beyond `oldest`
        self.oldest = self.place - window.to(I32).splat()
        self.lowest = self.place.lane(0).to(I64)
        self.end = self.place.lane(LANES - 1).to(I64) + 1
        self.start = _first_seen(self.lowest, window)
        self.last_start = _first_seen(self.end - 1, window)

    def _load_queries(self, q: Value, positions: Value) -> Value:
        """Load the queries, one in each lane, and return their positions."""
        f, places = self.f, self.f.buffer(VECTOR)
        last = self.tokens - 1
        with f.loop(LANES) as lane:
            t = self.first_token + lane
            t = (t < last).select(t, last)  # lanes beyond the last token copy it, without effect
            f.store(f.load(I32, f.offset(positions, t * 4)), f.offset(places, lane * 4))
            with f.loop(self.dim) as d:
                x = f.load(F32, f.offset(q, ((self.first_row + t) * self.dim + d) * 4))
                f.store(x, f.offset(self.queries, (d * LANES + lane) * 4))
        return f.load(vec(I32), places, align=64)

    def add_block(self, first: Value) -> None:
        """Add the positions from `first` on, up to 32 of them, to the result."""
        f, block = self.f, self._block(first)
        largest = f.variable(self.highest.value)
        self._load_rows(self.cache.keys, self.keys, block)
        self._store_scores(block, largest)
        is_seen_by_all = block.all_start.equals(0) & block.all_end.equals(BLOCK)
        with f.when(is_seen_by_all.equals(0)):
            largest.value = self.highest.value
            self._mask_scores(block, largest)
        factor = exp(f, self.highest.value - largest.value)
        self.highest.value = largest.value
        self._store_weights(block, factor)
        self._load_rows(self.cache.values, self.values, block)
        self._add_values(block, factor)

    def _block(self, first: Value) -> _Block:
        def within(low: Operand, i: Value, high: Operand) -> Value:
            i = (i < low).select(low, i)
            return (i > high).select(high, i)

        start = within(0, self.start - first, BLOCK)
        end = within(0, self.end - first, BLOCK)
        all_start = within(start, self.last_start - first, end)
        all_end = within(all_start, self.lowest + 1 - first, end)
        return _Block(first, start, end, all_start, all_end)

    def _load_rows(self, kind: Rows, source: Value, block: _Block) -> None:
        """Load positions of the cache into `rows` as float32, without separate scales."""
        f = self.f
        with f.loop(block.end, start=block.start) as j:
            row = f.offset(source, (self.first_slot + block.first + j) * kind.bytes)
            to = f.offset(self.rows, j * self.row_bytes)
            for d, n in kind.pieces():
                f.store(kind.load(f, row, d, n), to, 4 * d)

    def _multiplied(self, x: Value, scales: Value, block: _Block, j: Value) -> Value:
        """Return x times the scale of a position, or of any, if it may be beyond the cache."""
        safe = block.first + (j < block.end).select(j, block.start)
        scale = _scale(self.f, self.cache, scales, self.first_slot + safe)
        return x if scale is None else x * scale.splat()

    def _is_seen(self, position: Value) -> Value:
        p = position.to(I32).splat()
        return (p <= self.place) & (p > self.oldest)

    def _store_scores(self, block: _Block, largest: Variable) -> None:
        """Store scores as if all tokens saw the positions of the block, and up to 3 others."""
        f = self.f
        with f.loop(block.end, start=block.start & -KEYS_TOGETHER, step=KEYS_TOGETHER) as j:
            scores = self._dots(f.offset(self.rows, j * self.row_bytes))
            for i, score in enumerate(scores):
                score = self._multiplied(score, self.key_scales, block, j + i)
                largest.value = (largest.value > score).select(largest.value, score)
                f.store(score, f.offset(self.weights, (j + i) * VECTOR), align=64)

    def _dots(self, rows: Value) -> list[Value]:
        """Return the dot products of the queries and some rows, added in the order of `_dot`."""
        f, whole = self.f, self.dim // LANES * LANES

        def terms(first: int, end: int) -> list[Value]:
            """Return the sums over every 16th channel."""
            found: list[Value] = []
            for d in range(first, end, LANES):
                x = f.load(FLOATS, self.queries, d * VECTOR, align=64)
                ys = [
                    f.load(F32, rows, i * self.row_bytes + 4 * d).splat()
                    for i in range(KEYS_TOGETHER)
                ]
                found = [f.fma(x, y, found[i]) if found else x * y for i, y in enumerate(ys)]
            return found

        sums = sums_in_pairs(LANES, lambda i: terms(i, whole)) if whole else []
        if self.dim > whole:
            rest = sums_in_pairs(self.dim - whole, lambda i: terms(whole + i, self.dim))
            sums = [a + b for a, b in zip(sums, rest, strict=True)] if sums else rest
        return sums

    def _mask_scores(self, block: _Block, largest: Variable) -> None:
        """Replace the scores of all positions of the block that a token does not see."""
        f = self.f
        with f.loop(BLOCK) as j:
            at = f.offset(self.weights, j * VECTOR)
            score = self._is_seen(block.first + j).select(f.load(FLOATS, at, align=64), LOWEST)
            largest.value = (largest.value > score).select(largest.value, score)
            f.store(score, at, align=64)

    def _store_weights(self, block: _Block, factor: Value) -> None:
        """Replace scores by weights, multiplied by the scales of values, and add them to totals.

        There are 16 totals, as the kernel for one token has one in each lane.
        """
        f = self.f

        def add(i: Value, total_at: Value, total: Value) -> None:
            at = f.offset(self.weights, i * VECTOR)
            score = f.load(FLOATS, at, align=64)
            # a score that is NaN must reach the result
            p = (score <= LOWEST).select(0.0, exp(f, score - self.highest.value))
            f.store(total + p, total_at, align=64)
            f.store(self._multiplied(p, self.value_scales, block, i), at, align=64)

        with f.loop(LANES) as i:
            at = f.offset(self.totals, i * VECTOR)
            add(i, at, f.load(FLOATS, at, align=64) * factor)
        with f.loop(block.end, start=LANES) as i:
            at = f.offset(self.totals, i % LANES * VECTOR)
            add(i, at, f.load(FLOATS, at, align=64))

    def _add_values(self, block: _Block, factor: Value) -> None:
        """Add values times weights to the result.

        A value that a token does not see may be infinite. So it is not multiplied by 0.
        """
        f = self.f
        with f.loop(self.channels, step=CHANNELS_TOGETHER) as d:
            at, source = f.offset(self.result, d * VECTOR), f.offset(self.rows, d * 4)
            sums = [
                f.variable(f.load(FLOATS, at, VECTOR * i, align=64) * factor)
                for i in range(CHANNELS_TOGETHER)
            ]

            def add(start: Value, end: Value, is_masked: bool) -> None:
                with f.loop(end, start=start) as j:
                    p = f.load(FLOATS, f.offset(self.weights, j * VECTOR), align=64)
                    row = f.offset(source, j * self.row_bytes)
                    for i, s in enumerate(sums):
                        new = f.fma(p, f.load(F32, row, 4 * i).splat(), s.value)
                        if is_masked:
                            new = self._is_seen(block.first + j).select(new, s.value)
                        s.value = new

            add(block.start, block.all_start, is_masked=True)
            add(block.all_start, block.all_end, is_masked=False)
            add(block.all_end, block.end, is_masked=True)
            for i, s in enumerate(sums):
                f.store(s.value, at, VECTOR * i, align=64)

    def finish(self) -> None:
        """Divide the result by the sum of the weights and store it."""
        f = self.f
        [total] = sums_in_pairs(
            LANES, lambda i: [f.load(FLOATS, self.totals, VECTOR * i, align=64)]
        )
        inverse = f.like(total, 1.0) / total
        for channel in range(self.dim):
            x = f.load(FLOATS, self.result, VECTOR * channel, align=64) * inverse
            f.store(x, self.result, VECTOR * channel, align=64)
        with f.loop(LANES) as lane:
            t = self.first_token + lane
            with f.when(t < self.tokens), f.loop(self.dim) as d:
                x = f.load(F32, f.offset(self.result, (d * LANES + lane) * 4))
                f.store(x, f.offset(self.out, ((self.first_row + t) * self.dim + d) * 4))


def emit_attention(module: Module, cache: Cache, group: int | None) -> None:
    """Write the handler `attention` for one token or for many.

    Its arguments are scaled queries (B, H, T, D) float32, positions (B, T) int32, the window (1,)
    int32, keys and values (B, K, S, D), and their scales (B, K, S), if they have separate ones. Its
    result is (B, H, T, D) float32.

    Args:
        group: Number of query heads that share a key head, for one token; None for many tokens.
    """
    pool.emit(module)
    is_one = group is not None
    job = (
        _emit_many_tokens(module, cache) if group is None else _emit_one_token(module, cache, group)
    )

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        q, positions, window, keys, values = args[:5]
        scales = args[5:] if cache.has_scales else (keys, values)
        width = f.load(I32, window.data).to(I64)
        batch, heads, tokens = (q.dim(i) for i in range(3))
        packed = f.pack(
            q.data,
            positions.data,
            keys.data,
            values.data,
            *(s.data for s in scales),
            rets[0].data,
            width,
            heads,
            keys.dim(1),
            tokens,
            keys.dim(2),
        )
        chunks = batch * keys.dim(1)
        if not is_one:
            chunks = batch * heads * ((tokens + (LANES - 1)) // LANES)
        f.call("pool_run", VOID, state, f.address_of(job), packed, chunks)

    ffi.emit_handler(module, "attention", 7 if cache.has_scales else 5, 1, call)
