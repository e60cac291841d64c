"""Kernels that move the rows of a cache of keys and values.

They copy only the slots that are in use. The others keep what the memory holds, since attention
does not read them. So memory that no slot uses is never touched, and the system need not provide
it: fresh memory costs more time than anything else here.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from phicore_jax.kernels import ffi, pool
from phicore_jax.kernels.ffi import Buffer
from phicore_jax.kernels.lang import I32, I64, PTR, VOID, Function, Module, Value

# Arguments of the jobs, in 64-bit words; pairs of addresses follow, from and to.
ROWS, SLOTS, HEADS, OLD_SLOTS, NEW_SLOTS, ADDRESSES = range(6)


def emit_empty(module: Module, count: int) -> None:
    """Write the handler `empty`, which leaves its results as they are."""

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        pass

    ffi.emit_handler(module, "empty", 0, count, call)


def emit_copy_rows(module: Module, slot_bytes: Sequence[int]) -> None:
    """Write the handler `copy_rows`.

    Its arguments are the indices of rows (N,) int32, the numbers of their slots to copy (N,) int32,
    and arrays (B, K, S, ...). Its results are arrays (N, K, any number of slots, ...).

    Args:
        slot_bytes: The number of bytes of a slot in each array.
    """
    pool.emit(module)
    job = _emit_job(module, slot_bytes, is_insert=False)

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        rows, slots, *old = args
        _run(f, state, job, rows, slots, old, rets)

    ffi.emit_handler(module, "copy_rows", 2 + len(slot_bytes), len(slot_bytes), call)


def emit_insert_row(module: Module, slot_bytes: Sequence[int]) -> None:
    """Write the handler `insert_row`.

    Its arguments are the index of a row (1,) int32, the number of slots to copy (1,) int32, the
    arrays of the new row (1, K, any number of slots, ...), and arrays (B, K, S, ...), which are
    also its results.

    Args:
        slot_bytes: The number of bytes of a slot in each array.
    """
    pool.emit(module)
    job = _emit_job(module, slot_bytes, is_insert=True)

    def call(f: Function, state: Value, args: Sequence[Buffer], rets: Sequence[Buffer]) -> None:
        index, slots, *new = args[: 2 + len(slot_bytes)]
        _run(f, state, job, index, slots, new, rets)

    ffi.emit_handler(module, "insert_row", 2 + 2 * len(slot_bytes), len(slot_bytes), call)


def _emit_job(module: Module, slot_bytes: Sequence[int], is_insert: bool) -> ir.Function:
    """Write a job that copies a head; the chunks are the heads of all rows that are copied."""

    def head(f: Function, args: Value, chunk: Value, slot: Value) -> None:
        rows, slots = (f.load(PTR, args, 8 * i) for i in (ROWS, SLOTS))
        heads, old_slots, new_slots = (
            f.load(I64, args, 8 * i) for i in (HEADS, OLD_SLOTS, NEW_SLOTS)
        )
        number, head = chunk // heads, chunk % heads
        row = f.load(I32, f.offset(rows, number * 4)).to(I64)
        count = f.load(I32, f.offset(slots, number * 4)).to(I64)
        source, target = (number, row) if is_insert else (row, number)
        source, target = (source * heads + head) * old_slots, (target * heads + head) * new_slots
        for i, size in enumerate(slot_bytes):
            old, new = (f.load(PTR, args, 8 * (ADDRESSES + 2 * i + j)) for j in range(2))
            old, new = f.offset(old, source * size), f.offset(new, target * size)
            f.call("memcpy", PTR, new, old, count * size)

    return module.function("move_head", [PTR, I64, I64], head, exported=False)


def _run(
    f: Function,
    state: Value,
    job: ir.Function,
    rows: Buffer,
    slots: Buffer,
    old: Sequence[Buffer],
    new: Sequence[Buffer],
) -> None:
    heads = old[0].dim(1)
    addresses = [buffer.data for pair in zip(old, new, strict=True) for buffer in pair]
    sizes = heads, old[0].dim(2), new[0].dim(2)
    packed = f.pack(rows.data, slots.data, *sizes, *addresses)
    f.call("pool_run", VOID, state, f.address_of(job), packed, rows.dim(0) * heads)
