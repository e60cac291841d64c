"""Threads that share the work of a kernel.

XLA calls a kernel on one thread. The other threads of the pool, the helpers, are Python threads
that never return from `pool_worker`. A job is a function and a number of chunks. Each thread owns a
contiguous range of chunks, since memory is read fastest in order. A thread that has finished its
range takes chunks from the ranges of other threads. So nobody waits for a helper that is late or
was never started. A caller that finds the pool busy, with another model's kernel, does its job
alone.
"""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING

import numpy as np
from llvmlite import ir

from phicore.backend.host import cpu_count
from phicore.backend.options import MOST_THREADS
from phicore_jax.kernels.lang import I32, I64, PTR, Function, Module, Value

if TYPE_CHECKING:
    from phicore_jax.kernels.build import Library

# Offsets in the shared state, in bytes. Different threads write to different cache lines.
GATE = 0  # generation << 32 | closed << 31 | number of helpers at work
LOCK = 64
JOB, ARGS, SIZE, CONTROL = 128, 136, 144, 152
SLOTS = 192
CURSOR, END, PARKED, READ_END, WRITE_END = 0, 8, 64, 72, 80
SLOT_BYTES = 128

CLOSED = 1 << 31
COUNT = CLOSED - 1
SPINS = 20_000  # about 0.3 ms: the next kernel of a step comes earlier, the next prompt later


def emit(module: Module) -> None:
    """Add `pool_run(state, function, args, chunks)` to a module.

    It calls function(args, chunk, slot) for each chunk. The slot is the number of the thread.
    """
    module.function("pool_work", [PTR, I64], _work, exported=False)
    module.function("pool_run", [PTR, PTR, PTR, I64], _run, exported=False)


def emit_worker(module: Module) -> None:
    """Add `pool_worker(state, slot)`, which never returns."""
    module.function("pool_work", [PTR, I64], _work, exported=False)
    module.function("pool_worker", [PTR, I64], _worker)


class _Atomic:
    """A 64-bit word that several threads write."""

    def __init__(self, f: Function, pointer: Value) -> None:
        self._f = f
        self._pointer = pointer

    def _value(self, x: Value | int) -> ir.Value:
        return x.ir if isinstance(x, Value) else I64(x)

    def load(self) -> Value:
        b = self._f.builder
        return Value(self._f, b.load_atomic(self._pointer.ir, "acquire", 8, typ=I64))

    def store(self, x: Value | int) -> None:
        self.update("xchg", x)

    def update(self, op: str, x: Value | int) -> Value:
        """Apply an operation such as `add`, and return the previous value."""
        b = self._f.builder
        return Value(self._f, b.atomic_rmw(op, self._pointer.ir, self._value(x), "acq_rel"))

    def replace(self, old: Value | int, new: Value | int) -> Value:
        """Store `new` if the word is equal to `old`, and return whether it was."""
        b = self._f.builder
        pair = b.cmpxchg(self._pointer.ir, self._value(old), self._value(new), "acq_rel", "acquire")
        return Value(self._f, b.extract_value(pair, 1))


def _slot(f: Function, state: Value, index: Value) -> Value:
    return f.offset(state + SLOTS, index * SLOT_BYTES)


def _work(f: Function, state: Value, slot: Value) -> None:
    """Run the chunks of this slot's range, then any that are left in other slots' ranges."""
    job, args = f.load(PTR, state, JOB), f.load(PTR, state, ARGS)
    size = f.load(I64, state, SIZE)
    with f.loop(size) as distance:
        owner = _slot(f, state, (slot + distance) % size)
        end = f.load(I64, owner, END)
        cursor = _Atomic(f, owner + CURSOR)
        chunk = f.variable(cursor.update("add", 1))
        with f.repeat_while(lambda: chunk.value < end):
            f.call_pointer(job, args, chunk.value, slot)
            chunk.value = cursor.update("add", 1)


def _run(f: Function, state: Value, job: Value, args: Value, chunks: Value) -> None:
    size = f.load(I64, state, SIZE)
    lock = _Atomic(f, state + LOCK)
    is_shared = f.variable(f.i64(0))
    with f.when(size > 1), f.when(chunks > 1), f.when(lock.replace(0, 1)):
        is_shared.value = f.i64(1)
    with f.if_else(is_shared.value.equals(1)) as (shared, alone):
        with shared:
            _run_shared(f, state, job, args, chunks, size)
            lock.store(0)
        with alone, f.loop(chunks) as chunk:
            f.call_pointer(job, args, chunk, f.i64(0))


def _run_shared(
    f: Function, state: Value, job: Value, args: Value, chunks: Value, size: Value
) -> None:
    f.store(job, state, JOB)
    f.store(args, state, ARGS)
    f.store(f.target.float_control(f), state, CONTROL)
    with f.loop(size) as index:
        slot = _slot(f, state, index)
        _Atomic(f, slot + CURSOR).store(chunks * index // size)
        f.store(chunks * (index + 1) // size, slot, END)
    gate = _Atomic(f, state + GATE)
    gate.store(((gate.load() >> 32) + 1) << 32)
    with f.loop(size, start=1) as index:
        slot = _slot(f, state, index)
        with (
            f.when(f.load(I64, slot, PARKED).equals(1)),
            f.when(_Atomic(f, slot + PARKED).update("xchg", 0).equals(1)),
        ):
            f.call("write", I64, f.load(I32, slot, WRITE_END), slot, f.i64(1))
    f.call("pool_work", ir.VoidType(), state, f.i64(0))
    gate.update("or", CLOSED)  # no helper can join any more; wait for those at work
    with f.repeat_while(lambda: (gate.load() & COUNT) > 0):
        f.target.pause(f)


def _worker(f: Function, state: Value, index: Value) -> None:
    """Run a helper: wait for a new generation and help with its job; after a while, sleep."""
    gate, slot = _Atomic(f, state + GATE), _slot(f, state, index)
    parked = _Atomic(f, slot + PARKED)
    last = f.variable(f.i64(0))  # the latest generation that it helped with
    spins = f.variable(f.i64(0))
    buffer = f.buffer(8)

    def is_new(seen: Value) -> Value:
        is_open = (seen & CLOSED).equals(0)
        return is_open & (seen >> 32).compare("!=", last.value)

    with f.repeat_while(lambda: f.i64(0).equals(0)):
        seen = gate.load()
        with f.if_else(is_new(seen)) as (work, wait):
            with work:
                with f.when(gate.replace(seen, seen + 1)):
                    last.value = seen >> 32
                    f.target.set_float_control(f, f.load(I64, state, CONTROL))
                    f.call("pool_work", ir.VoidType(), state, index)
                    gate.update("sub", 1)
                spins.value = f.i64(0)
            with wait:
                f.target.pause(f)
                spins.value = spins.value + 1
                with f.when(spins.value > SPINS):
                    spins.value = f.i64(0)
                    _park(f, gate, parked, slot, buffer, is_new)


def _park(f: Function, gate: _Atomic, parked: _Atomic, slot: Value, buffer: Value, is_new) -> None:  # type: ignore[no-untyped-def]
    """Sleep until the next job comes, unless it has come already."""
    parked.update("xchg", 1)
    must_read = f.variable(f.i64(1))
    with f.when(is_new(gate.load())), f.when(parked.replace(1, 0)):
        must_read.value = f.i64(0)
    with f.when(must_read.value.equals(1)):  # the caller that clears `parked` writes a byte
        f.call("read", I64, f.load(I32, slot, READ_END), buffer, f.i64(1))


class Pool:
    """The helper threads and the state that they share with callers.

    Attributes:
        state: Address of the shared state, the first argument of `pool_run`.
        size: Number of threads, the caller's included.
    """

    def __init__(self, library: Library, size: int) -> None:
        self.size = size
        memory = np.zeros(SLOTS + SLOT_BYTES * size + 64, np.uint8)
        start = -memory.ctypes.data % 64
        words = memory[start : start + SLOTS + SLOT_BYTES * size].view(np.int64)
        words[GATE // 8] = CLOSED
        words[SIZE // 8] = size
        self._memory = memory
        self.state = int(words.ctypes.data)
        worker = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(
            library.address("pool_worker")
        )
        for slot in range(1, size):
            ends = os.pipe()
            base = (SLOTS + slot * SLOT_BYTES) // 8
            words[base + READ_END // 8], words[base + WRITE_END // 8] = ends
            threading.Thread(
                target=worker, args=(self.state, slot), daemon=True, name=f"phicore-{slot}"
            ).start()


def thread_count() -> int:
    """Return PHICORE_THREADS if positive, or the number of CPUs that this process may use."""
    wanted = os.environ.get("PHICORE_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return min(int(wanted), MOST_THREADS)
    return cpu_count()
