"""Kernels for matrices of float16, bfloat16 and float32 numbers.

A matrix is stored in strips of 16 rows. A strip holds the 16 numbers of its first column, then the
16 of its second column, and so on. A product is the sum of four float32 sums: one over columns
0, 4, 8, ..., one over columns 1, 5, 9, ..., and so on. The order of additions does not depend on
the number of rows of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from gguf import GGMLQuantizationType
from llvmlite import ir

from phicore_jax.kernels import ffi, matrix, pool
from phicore_jax.kernels.ffi import Buffer
from phicore_jax.kernels.lang import (
    F32,
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
    vec,
)
from phicore_jax.kernels.linear import FLOATS

Type = GGMLQuantizationType
ELEMENT_BYTES = {Type.F16: 2, Type.BF16: 2, Type.F32: 4}
CHAINS = 4


def strip_bytes(ggml_type: GGMLQuantizationType, columns: int) -> int:
    return columns * LANES * ELEMENT_BYTES[ggml_type]


def _values(f: Function, ggml_type: GGMLQuantizationType, at: Value) -> Value:
    """Load 16 numbers of a matrix as float32."""
    if ggml_type == Type.F32:
        return f.load(FLOATS, at)
    bits = f.load(vec(I16), at)
    if ggml_type == Type.F16:
        return f.target.half_to_float(bits)
    return (bits.to(I32, signed=False) << 16).bits_as(FLOATS)


# Arguments of the job, in 64-bit words; `matrix.Tiles` describes those from ROWS on.
W, X, Y, COLUMNS, OUT, PER_CHUNK, ROWS = range(7)


def tile(target: Target, rows: int) -> int:
    """Return the rows of a tile, of which each has four sums, that is fastest for some rows."""
    most = {"avx512vnni": 6, "neon": 3}.get(target.name, 2)
    return ceil(rows / ceil(rows / most))


def _emit_tile(module: Module, ggml_type: GGMLQuantizationType, tiles: matrix.Tiles) -> ir.Function:
    """Write a job: a chunk multiplies some strips by all rows of activations, tile by tile."""
    size, tile = ELEMENT_BYTES[ggml_type] * LANES, tiles.size

    def body(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        w, x, y = (f.load(PTR, args, 8 * i) for i in (W, X, Y))
        columns, out, per = (f.load(I64, args, 8 * i) for i in (COLUMNS, OUT, PER_CHUNK))
        strips = (out + (LANES - 1)) // LANES
        last = (chunk + 1) * per
        last = (last < strips).select(last, strips)
        with (
            tiles.matrices(f, args) as (i, first_tile, last_tile),
            f.loop(last, start=chunk * per) as strip,
            f.loop(last_tile, start=first_tile) as t,
        ):
            start = f.offset(w, (i * strips + strip) * columns * size)
            sums = [[f.variable(f.zeros(FLOATS)) for _ in range(CHAINS)] for _ in range(tile)]
            sources = []
            for m in range(tile):
                row, _ = tiles.row(f, args, t * tile + m)
                sources.append(f.offset(x, row * columns * 4))
            whole = columns // CHAINS * CHAINS

            def add(k: Value, chain: int, start: Value = start, sums=sums, sources=sources) -> None:  # type: ignore[no-untyped-def]
                value = _values(f, ggml_type, f.offset(start, k * size))
                for source, chains in zip(sources, sums, strict=True):
                    scalar = f.load(F32, f.offset(source, k * 4)).splat()
                    chains[chain].value = f.fma(value, scalar, chains[chain].value)

            with f.loop(whole, step=CHAINS) as k:
                matrix.prefetch(f, f.offset(start, k * size), CHAINS * size)
                for c in range(CHAINS):
                    add(k + c, c)
            with f.loop(columns, start=whole) as k:
                add(k, 0)
            for m, chains in enumerate(sums):
                total = (chains[0].value + chains[1].value) + (chains[2].value + chains[3].value)
                row, is_there = tiles.row(f, args, t * tile + m)
                with f.when(is_there):
                    matrix.store(f, y, row, strip, out, total)

    return module.function("tile", [PTR, I64, I64], body, exported=False)


def emit_linear(
    module: Module, ggml_type: GGMLQuantizationType, tile: int, is_grouped: bool = False
) -> None:
    """Write the handler `linear`: x (rows, columns) and strips to y (rows, out).

    Args:
        tile: Rows of activations in a tile.
        is_grouped: The strips are of several matrices; the arguments `order` and `firsts` of
            `matrix.Tiles` follow the strips.
    """
    pool.emit(module)
    tiles = matrix.Tiles(tile, ROWS, is_grouped)
    job = _emit_tile(module, ggml_type, tiles)

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        (x, w, *others), (y,) = args, rets
        columns, out = x.dim(1), y.dim(1)
        per = f.i64(matrix.CHUNK_BYTES) // (columns * (LANES * ELEMENT_BYTES[ggml_type])) + 1
        strips = (out + (LANES - 1)) // LANES
        rest = tiles.arguments(f, x, others)
        packed = f.pack(w.data, x.data, y.data, columns, out, per, *rest)
        f.call("pool_run", VOID, state, f.address_of(job), packed, (strips + per - 1) // per)

    ffi.emit_handler(module, "linear", 4 if is_grouped else 2, 1, call)


def emit_pack(module: Module, ggml_type: GGMLQuantizationType) -> None:
    """Write the function `pack` of a type; see `matrix.emit_pack`."""
    size = ELEMENT_BYTES[ggml_type]
    element = ir.IntType(8 * size)

    def pack_block(f: Function, block: Value, to: Value, lane: Value) -> None:
        f.store(f.load(element, block), f.offset(to, lane * size))

    matrix.emit_pack(module, 1, size, size * LANES, pack_block)


def emit_rows(module: Module, ggml_type: GGMLQuantizationType) -> None:
    """Write the handler `rows` of a type; see `matrix.emit_rows`."""

    def read_block(f: Function, block: Value, pick: matrix.Pick, to: Value) -> None:
        f.store(pick(_values(f, ggml_type, block)), to)

    matrix.emit_rows(module, 1, ELEMENT_BYTES[ggml_type] * LANES, read_block)
