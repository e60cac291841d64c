"""Kernels for quantized matrices: packing, products, and reading of rows.

Activations are rounded to integers, too: every 8 columns of a row become multiples of 1 / 32767 of
their largest number. Sums of products of 8 columns are then exact in 32 bits, and the rounding
changes a product by 1e-5 of its size (llama.cpp's bytes: 7e-3). Sums over groups are float32 and
run in the order of the columns, whatever the number of rows or threads. So a prompt gives the same
bits in one piece and in many.

In memory, activations are tiles of a few rows. A tile has a record for each group of 32 columns.
`Product` describes a record: integers, their scales, and the sums that the format needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from gguf import GGMLQuantizationType
from llvmlite import ir

from phicore_jax.kernels import ffi, matrix, pool
from phicore_jax.kernels.ffi import Buffer
from phicore_jax.kernels.formats import BYTE_COLUMNS, FORMATS, GROUP, PAIRS, Format
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
    Target,
    Value,
    Variable,
    joined,
    vec,
)

STRIPS_AT_ONCE = 4  # strips that are decoded at a time, for all rows
SPAN = 8  # groups that are decoded at a time

FLOATS, INTS = vec(F32), vec(I32)


@dataclass(frozen=True)
class Product:
    """A kernel that multiplies matrices of a format by tiles of activations of 16 or 8 bits.

    The record of a group of columns is made of 32-bit words. Each word listed here is stored once
    for each row of the tile, one row after the other:

    - `words` words with the integers of 2 columns (16 bits) or 4 columns (8 bits) each.
    - `units` words with the float32 units that integers are multiples of: one for every
      `unit_columns` columns. It is divided by the power of two that is left in the codes (`place`).
    - `sums` words. If the format has a minimum: the float32 sum of the activations of each
      subgroup. If not: the int32 sum of the integers of each unit, times minus the codes' offset.

    Args:
        tile: Number of rows of activations in a tile.
        bits: Bits of an activation's integer.
        is_grouped: True if rows are multiplied by several matrices, as of experts.
        is_fused: Decode codes anew for each tile, instead of once for all tiles.
        strips: Decoded strips that are multiplied at a time, so that activations are loaded once.
    """

    format: Format
    tile: int
    bits: int = 16
    is_grouped: bool = False
    is_fused: bool = True
    strips: int = 2

    @property
    def name(self) -> str:
        """Name of the kernel, which says everything that it is specialized for."""
        kind = "fused" if self.is_fused else f"tiled-{self.strips}"
        prefix = "experts-" if self.is_grouped else ""
        return f"{prefix}linear-{self.format.type.name}-{self.bits}-{kind}-{self.tile}"

    @property
    def tiles(self) -> matrix.Tiles:
        return matrix.Tiles(self.tile, ROWS, self.is_grouped)

    @property
    def words(self) -> int:
        return GROUP * self.bits // 32

    @property
    def unit_columns(self) -> int:
        if self.bits == 16:
            return 8
        # llama.cpp has one unit for a block's columns; fewer columns make a smaller error
        return min(GROUP // self.format.subgroups, self.format.columns // 2)

    @property
    def units(self) -> int:
        return GROUP // self.unit_columns

    @property
    def sums(self) -> int:
        return self.format.subgroups if self.format.has_min else self.units

    @property
    def largest(self) -> float:
        return 2.0 ** (self.bits - 1) - 1

    @property
    def offset(self) -> int:
        """Offset of the codes. Products of 8 bits make signed codes unsigned by adding 128."""
        return 128 if self.bits == 8 and self.format.has_bytes else self.format.offset

    def place(self, unit: int) -> int:
        """Return the power of two by which the codes of a unit's columns are multiplied."""
        return self.format.place(unit * self.words // self.units) if self.bits == 16 else 0

    @property
    def record_bytes(self) -> int:
        return 4 * self.tile * (self.words + self.units + self.sums)

    def activation_bytes(self, tiles: int, columns: int) -> int:
        return tiles * (columns // GROUP) * self.record_bytes

    def sums_bytes(self, tiles: int) -> int:
        """Return the number of bytes that a thread needs for the sums of its strips."""
        return tiles * self.tile * STRIPS_AT_ONCE * 4 * LANES


class Arrangement(NamedTuple):
    """How products are arranged on a target, so that their sums stay in its registers.

    Attributes:
        fused: Rows in a tile if one strip is decoded anew for each tile.
        tiled: Rows in a tile if strips are decoded once for all tiles.
        strips: Such strips that are multiplied at a time.
        decoded_planes: For many rows, codes of so many planes or more are decoded once.
    """

    fused: int
    tiled: int
    strips: int
    decoded_planes: int


ARRANGEMENTS = {
    "avx512vnni": Arrangement(fused=8, tiled=6, strips=2, decoded_planes=3),
    "avx2": Arrangement(fused=6, tiled=4, strips=1, decoded_planes=1),
    "neon": Arrangement(fused=4, tiled=3, strips=2, decoded_planes=2),
}
SMALL = Arrangement(fused=3, tiled=2, strips=2, decoded_planes=2)  # of the other targets
MANY_ROWS = 32
DECODING = 0.4  # the work that a tile takes beside that of its rows, in rows (measured)


def arranged(
    target: Target, fmt: Format, rows: int, *, is_fast: bool = False, is_grouped: bool = False
) -> Product:
    """Return the product that is fastest for a number of rows.

    Args:
        is_fast: Round activations to 8 bits, if there are many rows and that is faster.
    """
    sizes, is_many = ARRANGEMENTS.get(target.name, SMALL), rows > MANY_ROWS
    has_bytes = target.has_byte_dot or (target.has_byte_pairs and not fmt.has_bytes)
    bits = 8 if is_fast and is_many and has_bytes else 16
    is_fused = bits == 16 and not (is_many and len(fmt.planes) >= sizes.decoded_planes)
    tile = sizes.fused if is_fused else sizes.tiled
    if bits == 8 and target.has_byte_pairs and fmt.largest_code > 15:
        tile -= 1  # sums that outgrow 16 bits take more registers
    # Fewer rows in a tile mean more tiles, larger tiles more rows that are computed for nothing.
    tile = min(range(min(rows, tile), 0, -1), key=lambda t: ceil(rows / t) * (t + DECODING))
    return Product(fmt, tile, bits, is_grouped, is_fused, sizes.strips)


# Arguments of the jobs, in 64-bit words; `matrix.Tiles` describes those from ROWS on.
W, X, Y, WORKSPACE, COLUMNS, OUT, PER_CHUNK, ROWS = range(8)


# ---- activations ---------------------------------------------------------------------------


def _quantize_group(f: Function, p: Product, x: Value, record: Value, row: Value) -> None:
    """Round 32 columns of a row of activations to integers, and store them in a record."""
    size, at = p.unit_columns, f.offset(record, row * 4)

    def put(value: Value, word: int) -> None:
        f.store(value, at, 4 * p.tile * word)

    integers, units = [], []
    for i in range(p.units):
        part = f.load(vec(F32, size), x, 4 * size * i)
        largest = f.maximum_of_lanes(f.absolute(part))
        is_none = largest <= 1e-30  # false for NaN, which must reach the result
        units.append(is_none.select(0.0, largest * (1 / p.largest)))
        inverse = is_none.select(0.0, f.f32(p.largest) / largest)
        integers.append(f.round_even(part * inverse.splat(size)).to(I32))
        put(units[i] * 2.0 ** -p.place(i), p.words + i)
    totals = [f.sum_of_lanes(part) for part in integers]
    if p.format.has_min:
        products = [unit * total.to(F32) for unit, total in zip(units, totals, strict=True)]
        per = p.units // p.format.subgroups
        for i in range(p.format.subgroups):
            total = products[i * per]
            for product in products[i * per + 1 : (i + 1) * per]:
                total = total + product
            put(total, p.words + p.units + i)
    else:
        for i, total in enumerate(totals):
            put(total * -(p.offset << p.place(i)), p.words + p.units + i)
    columns = joined(integers)
    if p.bits == 16:
        words = columns.to(I16).bits_as(vec(I32, p.words))
    else:
        order = [column for word in BYTE_COLUMNS for column in word]
        words = columns.lanes(order).to(I8).bits_as(vec(I32, p.words))
    if p.tile == 1:
        f.store(words, at)
    else:
        for i in range(p.words):
            put(words.lane(i), i)


def _emit_quantize(module: Module, p: Product) -> ir.Function:
    """Write a job that rounds activations to integers and stores records; a chunk is a tile."""

    def body(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        x, out = f.load(PTR, args, 8 * X), f.load(PTR, args, 8 * WORKSPACE)
        columns = f.load(I64, args, 8 * COLUMNS)
        groups = columns // GROUP
        out = f.offset(out, chunk * groups * p.record_bytes)
        with f.loop(groups) as g, f.loop(p.tile) as i:
            row, _ = p.tiles.row(f, args, chunk * p.tile + i)
            source = f.offset(x, (row * columns + g * GROUP) * 4)
            _quantize_group(f, p, source, f.offset(out, g * p.record_bytes), i)

    return module.function("quantize", [PTR, I64, I64], body, exported=False)


# ---- products ------------------------------------------------------------------------------


class Strip(NamedTuple):
    """A group of columns of 16 rows of weights, decoded for a product.

    Attributes:
        codes: Returns the codes of the word of columns with an index, (16,) int32.
        scales: The scale and the bias of each subgroup.
        totals: The sums over all groups so far, one for each row of the tile.
    """

    codes: Callable[[int], Value]
    scales: Sequence[tuple[Value, Value | None]]
    totals: Sequence[Variable]


class _Dot:
    """A sum of products of codes and activations, by words of columns."""

    def __init__(self, f: Function, p: Product, start: Value) -> None:
        self._f = f
        self._p = p
        self._total = start
        self._short: Value | None = None  # a part of it in lanes of 16 bits
        self._count = 0  # words in it

    def add(self, codes: Value, x: Value) -> None:
        target, p = self._f.target, self._p
        if p.bits == 16:
            self._total = target.dot_pairs(self._total, codes, x)
        elif target.has_byte_dot:
            self._total = target.dot_bytes(self._total, codes, x)
        else:
            pairs = target.dot_byte_pairs(codes, x)
            self._short = pairs if self._short is None else self._short + pairs
            self._count += 1
            if (self._count + 1) * 2 * p.format.largest_code * p.largest > 2**15 - 1:
                self._widen()

    @staticmethod
    def in_order(dots: Sequence[_Dot]) -> None:
        """See `Target.in_order`."""
        totals = [dot._short or dot._total for dot in dots]
        for dot, total in zip(dots, dots[0]._f.target.in_order(totals), strict=True):
            if dot._short is None:
                dot._total = total
            else:
                dot._short = total

    def _widen(self) -> None:
        if self._short is not None:
            ones = self._f.like(self._short, 1)
            self._total = self._f.target.dot_pairs(self._total, self._short, ones)
            self._short, self._count = None, 0

    def total(self) -> Value:
        self._widen()
        return self._total


def _dot_group(
    f: Function,
    p: Product,
    strips: Sequence[Strip],
    record: Value,
    has_offset: bool,
) -> None:
    """Add the products of strips and a tile, over a group of columns, to the strips' totals.

    Args:
        record: The group's record of the tile.
        has_offset: The codes contain an offset, which the record's sums compensate.
    """

    def broadcast(t: ir.Type, word: int, m: int) -> Value:
        return f.load(t, record, 4 * (word * p.tile + m)).splat()

    rows, sums_at = range(p.tile), p.words + p.units
    words_per_unit, units_per_scale = p.words // p.units, p.units // p.format.subgroups
    for i in range(p.format.subgroups):
        parts: list[list[Value]] = [[] for _ in strips]
        for unit in range(i * units_per_scale, (i + 1) * units_per_scale):
            zero = f.zeros(INTS)
            start = [broadcast(I32, sums_at + unit, m) if has_offset else zero for m in rows]
            dots = [[_Dot(f, p, total) for total in start] for _ in strips]
            for word in range(unit * words_per_unit, (unit + 1) * words_per_unit):
                codes = [strip.codes(word) for strip in strips]
                for m in rows:
                    x = broadcast(I32, word, m)
                    for of_strip, w in zip(dots, codes, strict=True):
                        of_strip[m].add(w, x)
                _Dot.in_order([dot for of_strip in dots for dot in of_strip])
            for m in rows:
                u = broadcast(F32, p.words + unit, m)
                for part, of_strip in zip(parts, dots, strict=True):
                    total = of_strip[m].total().to(F32)
                    if len(part) < p.tile:
                        part.append(total * u)
                    else:
                        part[m] = f.fma(total, u, part[m])
        for m in rows:
            for part, strip in zip(parts, strips, strict=True):
                scale, bias = strip.scales[i]
                total = f.fma(part[m], scale, strip.totals[m].value)
                if bias is not None:
                    total = f.fma(bias, broadcast(F32, sums_at + i, m), total)
                strip.totals[m].value = total


def _strips(f: Function, args: Value) -> Value:
    return (f.load(I64, args, 8 * OUT) + (LANES - 1)) // LANES


def _strips_of_chunk(f: Function, args: Value, chunk: Value) -> tuple[Value, Value]:
    per, strips = f.load(I64, args, 8 * PER_CHUNK), _strips(f, args)
    last = (chunk + 1) * per
    return chunk * per, (last < strips).select(last, strips)


def _emit_fused(module: Module, p: Product) -> ir.Function:
    """Write a job that multiplies one tile after the other, and decodes codes anew for each."""
    fmt = p.format

    def body(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        w, y, act = (f.load(PTR, args, 8 * i) for i in (W, Y, WORKSPACE))
        columns, out = f.load(I64, args, 8 * COLUMNS), f.load(I64, args, 8 * OUT)
        blocks = columns // fmt.columns
        first, last = _strips_of_chunk(f, args, chunk)
        tile_bytes = blocks * (fmt.groups * p.record_bytes)
        with (
            p.tiles.matrices(f, args) as (i, first_tile, last_tile),
            f.loop(last_tile, start=first_tile) as t,
            f.loop(last, start=first) as strip,
        ):
            totals = [f.variable(f.zeros(FLOATS)) for _ in range(p.tile)]
            start = f.offset(w, (i * _strips(f, args) + strip) * blocks * fmt.block_bytes)
            records = f.offset(act, t * tile_bytes)
            with f.loop(blocks) as b:
                block = f.offset(start, b * fmt.block_bytes)
                record = f.offset(records, b * (fmt.groups * p.record_bytes))
                matrix.prefetch(f, block, fmt.planes_start)
                supers = fmt.super_scales(f, block)
                with f.loop(fmt.groups) as g:
                    group = f.offset(block + fmt.planes_start, g * fmt.group_bytes)
                    matrix.prefetch(f, group, fmt.group_bytes)
                    scales = fmt.group_scales(f, block, supers, g)

                    def codes(pair: int, group: Value = group) -> Value:
                        return fmt.pair_codes(f, group, pair, fmt.place(pair))

                    at = f.offset(record, g * p.record_bytes)
                    decoded = Strip(codes, scales, totals)
                    _dot_group(f, p, [decoded], at, has_offset=fmt.offset != 0)
            for m, total in enumerate(totals):
                row, is_there = p.tiles.row(f, args, t * p.tile + m)
                with f.when(is_there):
                    matrix.store(f, y, row, strip, out, total.value)

    return module.function("fused", [PTR, I64, I64], body, exported=False)


def _emit_tiled(module: Module, p: Product) -> ir.Function:
    """Write a job for many rows, which decodes the codes of a few strips once for all tiles."""
    fmt = p.format
    vector = 4 * LANES
    group_bytes = vector * p.words
    scales_start = SPAN * group_bytes
    scale_bytes = vector * fmt.subgroups * (2 if fmt.has_min else 1)
    strip_bytes = scales_start + SPAN * scale_bytes
    is_offset_kept = p.bits == 8 and p.offset != 0

    def decode(
        f: Function, block: Value, supers: list[Value], g: Value, to: Value, n: Value
    ) -> None:
        """Decode group g of a block into group n of a decoded strip."""
        group = f.offset(block + fmt.planes_start, g * fmt.group_bytes)
        if p.bits == 8:
            codes = [fmt.byte_codes(f, group, word) for word in range(p.words)]
        else:
            places = [fmt.place(pair) for pair in range(PAIRS)]
            codes = [fmt.pair_codes(f, group, pair, at) for pair, at in enumerate(places)]
            if fmt.offset:
                codes = [c - (fmt.offset << at) for c, at in zip(codes, places, strict=True)]
        at = f.offset(to, n * group_bytes)
        for i, c in enumerate(codes):
            f.store(c, at, vector * i, align=64)
        at = f.offset(to + scales_start, n * scale_bytes)
        for scale, bias in fmt.group_scales(f, block, supers, g):
            f.store(scale, at, align=64)
            at = at + vector
            if bias is not None:
                f.store(bias, at, align=64)
                at = at + vector

    def multiply(f: Function, codes: Value, record: Value, groups: Value, sums: Value) -> None:
        """Add the products of adjacent decoded strips and a tile, over a span, to its sums."""
        totals = [
            [
                f.variable(f.load(FLOATS, sums, vector * (s * p.tile + m), align=64))
                for m in range(p.tile)
            ]
            for s in range(p.strips)
        ]
        with f.loop(groups) as g:
            strips = []
            for s in range(p.strips):
                at = f.offset(codes + s * strip_bytes, g * group_bytes)
                place = f.offset(codes + (s * strip_bytes + scales_start), g * scale_bytes)
                scales: list[tuple[Value, Value | None]] = []
                for _ in range(fmt.subgroups):
                    scale, bias = f.load(FLOATS, place, align=64), None
                    place = place + vector
                    if fmt.has_min:
                        bias, place = f.load(FLOATS, place, align=64), place + vector
                    scales.append((scale, bias))

                def word(i: int, at: Value = at) -> Value:
                    return f.load(INTS, at, vector * i, align=64)

                strips.append(Strip(word, scales, totals[s]))
            _dot_group(f, p, strips, f.offset(record, g * p.record_bytes), is_offset_kept)
        for s, of_strip in enumerate(totals):
            for m, total in enumerate(of_strip):
                f.store(total.value, sums, vector * (s * p.tile + m), align=64)

    def body(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        with p.tiles.matrices(f, args) as (number, first_tile, last_tile):
            multiply_all(f, args, chunk, slot, number, first_tile, last_tile)

    def multiply_all(
        f: Function,
        args: Value,
        chunk: Value,
        slot: Value,
        number: Value,
        first_tile: Value,
        last_tile: Value,
    ) -> None:
        """Multiply the strips of a chunk, of one matrix, by all tiles of that matrix."""
        w, y, act = (f.load(PTR, args, 8 * i) for i in (W, Y, WORKSPACE))
        columns, out = (f.load(I64, args, 8 * i) for i in (COLUMNS, OUT))
        blocks, groups = columns // fmt.columns, columns // GROUP
        w = f.offset(w, number * _strips(f, args) * blocks * fmt.block_bytes)
        tiles, all_tiles = last_tile - first_tile, p.tiles.count(f, args)
        sums_size = p.tile * STRIPS_AT_ONCE * vector
        all_sums = f.offset(act, all_tiles * groups * p.record_bytes)
        all_sums = f.offset(f.align(all_sums, 64), slot * all_tiles * sums_size)
        first, last = _strips_of_chunk(f, args, chunk)
        decoded = f.buffer(STRIPS_AT_ONCE * strip_bytes)
        with f.loop(tiles * (sums_size // vector)) as i:
            f.store(f.zeros(FLOATS), f.offset(all_sums, i * vector), align=64)
        with f.loop(groups, step=SPAN) as start:
            left = groups - start
            count = (left < SPAN).select(left, SPAN)
            with f.loop(STRIPS_AT_ONCE) as s:
                # strips beyond the last are copies of it, whose results are not stored
                strip = first + s
                strip = (strip < last).select(strip, last - 1)
                from_ = f.offset(w, (strip * blocks + start // fmt.groups) * fmt.block_bytes)
                with f.loop(count // fmt.groups) as b:
                    block = f.offset(from_, b * fmt.block_bytes)
                    supers = fmt.super_scales(f, block)
                    with f.loop(fmt.groups) as g:
                        to = f.offset(decoded, s * strip_bytes)
                        decode(f, block, supers, g, to, b * fmt.groups + g)
            with f.loop(tiles) as t:
                place = (first_tile + t) * groups + start
                record = f.offset(act, place * p.record_bytes)
                with f.loop(STRIPS_AT_ONCE, step=p.strips) as s:
                    codes = f.offset(decoded, s * strip_bytes)
                    sums = f.offset(all_sums, (t * STRIPS_AT_ONCE + s) * (p.tile * vector))
                    multiply(f, codes, record, count, sums)
        with f.loop(tiles) as t, f.loop(p.tile) as m:
            row, is_there = p.tiles.row(f, args, (first_tile + t) * p.tile + m)
            with f.when(is_there), f.loop(last, start=first) as strip:
                at = (t * STRIPS_AT_ONCE + (strip - first)) * p.tile + m
                total = f.load(FLOATS, f.offset(all_sums, at * vector), align=64)
                matrix.store(f, y, row, strip, out, total)

    return module.function("tiled", [PTR, I64, I64], body, exported=False)


def emit_linear(module: Module, p: Product) -> None:
    """Write the handler `linear`: x (rows, columns) and strips to y (rows, out) and a workspace.

    If the product is grouped, the arguments `order` and `firsts` of `matrix.Tiles` follow the
    strips.
    """
    fmt = p.format
    pool.emit(module)
    quantize = _emit_quantize(module, p)
    product = _emit_fused(module, p) if p.is_fused else _emit_tiled(module, p)

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        (x, w, *others), (y, workspace) = args, rets
        columns, out = x.dim(1), y.dim(1)
        per = f.i64(STRIPS_AT_ONCE)
        if p.is_fused:
            per = f.i64(matrix.CHUNK_BYTES) // (columns // fmt.columns * fmt.block_bytes) + 1
        tiles = p.tiles.arguments(f, x, others)
        packed = f.pack(w.data, x.data, y.data, workspace.data, columns, out, per, *tiles)
        count = p.tiles.count(f, packed)
        f.call("pool_run", VOID, state, f.address_of(quantize), packed, count)
        chunks = (_strips(f, packed) + per - 1) // per
        f.call("pool_run", VOID, state, f.address_of(product), packed, chunks)

    ffi.emit_handler(module, "linear", 4 if p.is_grouped else 2, 2, call)


# ---- packing, and rows ---------------------------------------------------------------------


def emit_pack(module: Module, ggml_type: GGMLQuantizationType) -> None:
    """Write the function `pack` of a type; see `matrix.emit_pack`."""
    fmt = FORMATS[ggml_type]
    matrix.emit_pack(module, fmt.columns, fmt.file_block_bytes, fmt.block_bytes, fmt.pack_block)


def emit_rows(module: Module, ggml_type: GGMLQuantizationType) -> None:
    """Write the handler `rows` of a type, bit-exact with `gguf.quants`; see `matrix.emit_rows`."""
    fmt = FORMATS[ggml_type]

    def read_block(f: Function, block: Value, pick: matrix.Pick, to: Value) -> None:
        supers, pairs = fmt.super_scales(f, block), f.buffer(4 * PAIRS)
        count = GROUP // fmt.subgroups
        with f.loop(fmt.groups) as g:
            group = f.offset(block + fmt.planes_start, g * fmt.group_bytes)
            for i in range(PAIRS):
                codes = fmt.pair_codes(f, group, i)
                f.store(pick(codes.bits_as(INTS)), pairs, 4 * i)
            values = f.load(vec(I16, GROUP), pairs) - fmt.offset
            for i, (scale, bias) in enumerate(fmt.group_scales(f, block, supers, g)):
                part = values.lanes(list(range(i * count, (i + 1) * count))).to(F32)
                part = part * pick(scale).splat(count)
                if bias is not None:
                    part = part + pick(bias).splat(count)
                f.store(part, f.offset(to, g * (4 * GROUP)), 4 * i * count)

    matrix.emit_rows(module, fmt.columns, fmt.block_bytes, read_block)
