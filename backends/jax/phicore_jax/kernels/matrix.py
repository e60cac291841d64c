"""Parts of kernels that matrices of all types share.

`emit_pack` packs the rows of a file into strips of 16 rows, and `emit_rows` reads rows of strips.
Both go over a row in blocks of columns; each type has its own functions to write and read a block.

Products process rows of activations in tiles, for one matrix or for several (`Tiles`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from phicore_jax.kernels import ffi, pool
from phicore_jax.kernels.ffi import Buffer
from phicore_jax.kernels.lang import F32, I32, I64, LANES, PTR, VOID, Function, Module, Value

CHUNK_BYTES = 64 << 10  # weights in a chunk, which is the unit of work of a thread

# Weights are prefetched into the second cache far ahead, because a core waits for more lines at a
# time there, and into the first one when they are near.
FAR, NEAR = 8192, 1024  # bytes ahead

Pick = Callable[[Value], Value]


@dataclass(frozen=True)
class Tiles:
    """Tiles of rows of activations, and the matrix that each tile is multiplied by.

    With one matrix, the rows fill the tiles in order. With X matrices, such as experts, all rows of
    a tile are multiplied by one matrix. Then `order` (slots,) int32 holds the row in each slot of
    the tiles, or -1 for an empty slot. Matrix i has the tiles from `firsts[i]` up to, but not
    including, `firsts[i + 1]`; `firsts` is (X + 1,) int32.

    Args:
        size: Number of rows in a tile.
        first_argument: Index of the first of five arguments of a job: the number of rows, the
            number of tiles, `order`, `firsts`, and X.
        is_grouped: True if there are several matrices.
    """

    size: int
    first_argument: int
    is_grouped: bool = False

    def arguments(self, f: Function, x: Buffer, others: Sequence[Buffer]) -> list[Value]:
        """Return the five arguments of a job; `others` are `order` and `firsts`, if grouped."""
        rows = x.dim(0)
        if not self.is_grouped:
            return [rows, (rows + (self.size - 1)) // self.size, f.null(), f.null(), f.i64(1)]
        order, firsts = others
        count = firsts.dim(0) - 1
        return [rows, order.dim(0) // self.size, order.data, firsts.data, count]

    def count(self, f: Function, args: Value) -> Value:
        return f.load(I64, args, 8 * (self.first_argument + 1))

    def row(self, f: Function, args: Value, slot: Value) -> tuple[Value, Value]:
        """Return the row in a slot and whether there is one; if not, some row that exists."""
        if not self.is_grouped:
            rows = f.load(I64, args, 8 * self.first_argument)
            return (slot < rows).select(slot, rows - 1), slot < rows
        order = f.load(PTR, args, 8 * (self.first_argument + 2))
        row = f.load(I32, f.offset(order, slot * 4)).to(I64)
        return (row < 0).select(0, row), row >= 0

    @contextmanager
    def matrices(self, f: Function, args: Value) -> Iterator[tuple[Value, Value, Value]]:
        """Loop over the matrices that have tiles: number, first tile, and tile after the last."""
        if not self.is_grouped:
            yield f.i64(0), f.i64(0), self.count(f, args)
            return
        firsts = f.load(PTR, args, 8 * (self.first_argument + 3))
        with f.loop(f.load(I64, args, 8 * (self.first_argument + 4))) as i:
            place = f.offset(firsts, i * 4)
            first, last = f.load(I32, place).to(I64), f.load(I32, place, 4).to(I64)
            with f.when(first < last):
                yield i, first, last


def prefetch(f: Function, weights: Value, size: int) -> None:
    """Prefetch what lies ahead of `size` bytes of weights that are read now."""
    for line in range(0, size, 64):
        f.prefetch(weights, FAR + line, level=2)
        f.prefetch(weights, NEAR + line)


def store(f: Function, y: Value, row: Value, strip: Value, out: Value, x: Value) -> None:
    """Store 16 results of a row of y, or fewer if fewer columns are left."""
    column = strip * LANES
    place = f.offset(y, (row * out + column) * 4)
    with f.if_else(column + LANES <= out) as (whole, part):
        with whole:
            f.store(x, place)
        with part:
            spill = f.buffer(4 * LANES)
            f.store(x, spill)
            with f.loop(out - column) as i:
                f.store(f.load(F32, f.offset(spill, i * 4)), f.offset(place, i * 4))


def emit_pack(
    module: Module,
    block_columns: int,
    file_bytes: int,
    strip_bytes: int,
    pack_block: Callable[[Function, Value, Value, Value], None],
) -> None:
    """Write the function `pack(state, args)`, which packs rows of a file into strips.

    `args` points to four 64-bit words: the address of the file's rows, the address of the strips,
    the number of rows and the number of columns.

    Args:
        block_columns: Columns of a block.
        file_bytes: Bytes of a block in the file.
        strip_bytes: Bytes of a block in a strip, for 16 rows.
        pack_block: Writes the instructions that put one row's block into a strip; called as
            (f, block of the file, block of the strip, lane).
    """
    pool.emit(module)

    def strip(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        source, w = f.load(PTR, args, 0), f.load(PTR, args, 8)
        rows, blocks = f.load(I64, args, 16), f.load(I64, args, 24) // block_columns
        start = f.offset(w, chunk * blocks * strip_bytes)
        with f.loop(LANES) as lane, f.loop(blocks) as b:
            # lanes beyond the last row are copies of it, whose results are not stored
            row = chunk * LANES + lane
            row = (row < rows).select(row, rows - 1)
            block = f.offset(source, (row * blocks + b) * file_bytes)
            pack_block(f, block, f.offset(start, b * strip_bytes), lane)

    job = module.function("pack_strip", [PTR, I64, I64], strip, exported=False)

    def body(f: Function, state: Value, args: Value) -> None:
        strips = (f.load(I64, args, 16) + (LANES - 1)) // LANES
        f.call("pool_run", VOID, state, f.address_of(job), args, strips)

    module.function("pack", [PTR, PTR], body)


def emit_rows(
    module: Module,
    block_columns: int,
    strip_bytes: int,
    read_block: Callable[[Function, Value, Pick, Value], None],
) -> None:
    """Write the handler `rows`: ids (n,) int32 and strips to y (n, columns) float32.

    Ids are clamped to the rows of the strips.

    Args:
        block_columns: Columns of a block.
        strip_bytes: Bytes of a block in a strip, for 16 rows.
        read_block: Writes the instructions that store one row's block in y; called as
            (f, block of the strip, pick, y). `pick(vector)` returns the row's lane of a vector of
            16 numbers of 32 bits.
    """
    pool.emit(module)

    def row(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        ids, w, y = (f.load(PTR, args, 8 * i) for i in range(3))
        columns, strips = f.load(I64, args, 24), f.load(I64, args, 32)
        blocks, last = columns // block_columns, strips * LANES - 1
        number = f.load(I32, f.offset(ids, chunk * 4)).to(I64)
        number = (number < 0).select(0, number)
        number = (number < last).select(number, last)
        start = f.offset(w, number // LANES * blocks * strip_bytes)
        lanes = f.buffer(4 * LANES)

        def pick(vector: Value) -> Value:
            f.store(vector, lanes)
            return f.load(vector.type.element, f.offset(lanes, number % LANES * 4))

        with f.loop(blocks) as b:
            to = f.offset(y, (chunk * columns + b * block_columns) * 4)
            read_block(f, f.offset(start, b * strip_bytes), pick, to)

    job = module.function("row", [PTR, I64, I64], row, exported=False)

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        (ids, w), (y,) = args, rets
        packed = f.pack(ids.data, w.data, y.data, y.dim(1), w.dim(0))
        f.call("pool_run", VOID, state, f.address_of(job), packed, y.dim(0))

    ffi.emit_handler(module, "rows", 2, 1, call)
