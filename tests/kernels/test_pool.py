"""Tests of the thread pool: each chunk runs once, even if helpers are busy, asleep or gone."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernels.made import run_python
from phicore_jax.kernels import build, pool
from phicore_jax.kernels.lang import I64, PTR, VOID, Function, Module, Target, Value

SIZES = (1, 2, 5)
PATIENCE_S = 60  # how long a test waits for an event that is due in a moment

Job = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def emit(module: Module) -> None:
    """Write `run(state, job, args, chunks)`, and a job that counts the visits of each chunk."""
    pool.emit(module)

    def run(f: Function, *args: Value) -> None:
        f.call("pool_run", VOID, *args)

    def count(f: Function, counters: Value, chunk: Value, slot: Value) -> None:
        at = f.offset(counters, chunk * 8)
        f.builder.atomic_rmw("add", at.ir, I64(1), "monotonic")

    def run_flushing(f: Function, *args: Value) -> None:
        """Run a job like `run`; if `is_flushing` is 1, subnormal numbers are 0 on this thread."""
        *args, is_flushing = args
        bits = 0x8040 if f.target.is_x86 else 1 << 24
        old = f.target.float_control(f)
        f.target.set_float_control(f, old | is_flushing * bits)
        f.call("pool_run", VOID, *args)
        f.target.set_float_control(f, old)

    module.function("run", [PTR, PTR, PTR, I64], run)
    module.function("run_flushing", [PTR, PTR, PTR, I64, I64], run_flushing)
    module.function("count", [PTR, I64, I64], count)


@cache
def libraries() -> tuple[build.Library, build.Library]:
    """Return the library of `emit` and that of the helpers."""
    compiler = build.Compiler(Target(build.supported_targets()[0]))
    compiler.folder = Path(os.devnull)  # no file is written
    worker = compiler.library("worker", pool.emit_worker, ["pool_worker"])
    return compiler.library("pool", emit, ["run", "run_flushing", "count"]), worker


@cache
def pool_of(size: int) -> pool.Pool:
    """Return a pool of some size. It is cached, since its threads never end."""
    return pool.Pool(libraries()[1], size)


def run(threads: pool.Pool, job: Any, chunks: int, args: int = 0) -> None:
    """Run the chunks of a job, which is a Python function or an address."""
    address = ctypes.cast(job, ctypes.c_void_p)
    function = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64
    )(libraries()[0].address("run"))
    function(threads.state, address, args, chunks)


def counting(chunks: int) -> tuple[np.ndarray, Callable[[pool.Pool], None]]:
    """Return counters of chunks, and a function that adds one to each on a pool."""
    counters = np.zeros(chunks + 1, np.int64)  # the last must stay 0
    job = libraries()[0].address("count")
    return counters, lambda threads: run(threads, job, chunks, counters.ctypes.data)


def wait_until_parked(threads: pool.Pool) -> None:
    slots = [pool.SLOTS + i * pool.SLOT_BYTES for i in range(1, threads.size)]
    parked = [ctypes.c_int64.from_address(threads.state + s + pool.PARKED) for s in slots]
    end = time.monotonic() + PATIENCE_S
    while not all(word.value for word in parked):
        assert time.monotonic() < end, "the helpers do not go to sleep"
        time.sleep(0.001)


@pytest.mark.parametrize("chunks", [0, 1, 2, 1000])
@pytest.mark.parametrize("size", SIZES)
def test_run_visits_every_chunk_once(size: int, chunks: int):
    counters, count = counting(chunks)
    for i in range(1, 5001):
        count(pool_of(size))
        assert (counters[:-1] == i).all()  # the helpers are done when it returns
        if i % 1000 == 0:
            wait_until_parked(pool_of(size))
    assert counters[-1] == 0


@pytest.mark.parametrize("is_parked", [True, False], ids=["asleep", "awake"])
@pytest.mark.parametrize("size", SIZES)
def test_run_all_threads_take_part(size: int, is_parked: bool):
    """Each chunk waits for the others, so one thread alone would wait for ever."""
    for _ in range(20):
        if is_parked:
            wait_until_parked(pool_of(size))
        barrier, seen = threading.Barrier(size), []

        def meet(args: int, chunk: int, slot: int, barrier=barrier, seen=seen) -> None:
            barrier.wait(PATIENCE_S)
            seen.append((chunk, slot))

        run(pool_of(size), Job(meet), size)
        chunks, slots = zip(*seen, strict=True)
        assert sorted(chunks) == sorted(slots) == list(range(size))


def test_helpers_compute_as_the_caller_does():
    """Helpers treat subnormal numbers as the caller does. XLA's threads take them for 0."""
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int64)(
        libraries()[0].address("run_flushing")
    )
    for is_flushing in (1, 0, 1):
        barrier, halves = threading.Barrier(2), {}

        def halve(args: int, chunk: int, slot: int, barrier=barrier, halves=halves) -> None:
            barrier.wait(PATIENCE_S)  # so that each thread gets one chunk
            halves[slot] = float(np.float32(2.0**-126) * np.float32(0.5))

        call(pool_of(2).state, ctypes.cast(Job(halve), ctypes.c_void_p), None, 2, is_flushing)
        half = 0 if is_flushing else 2.0**-127
        assert halves == {0: half, 1: half}


def test_run_while_the_pool_is_busy_works_alone():
    """The second caller's job runs while the first caller's job waits for its end."""
    seen, callers = [], []

    def second(args: int, chunk: int, slot: int) -> None:
        seen.append((chunk, slot, threading.current_thread()))
        time.sleep(0.002)  # time enough for a helper to come

    def first(args: int, chunk: int, slot: int) -> None:
        if not callers:
            callers.append(threading.Thread(target=run, args=(pool_of(2), Job(second), 10)))
            callers[0].start()
            callers[0].join(PATIENCE_S)

    run(pool_of(2), Job(first), 2)
    assert seen == [(chunk, 0, callers[0]) for chunk in range(10)]


def test_run_from_two_threads_at_once_visits_every_chunk_once():
    counts = [counting(5000), counting(3700)]

    def repeat(count: Callable[[pool.Pool], None]) -> None:
        for _ in range(2000):
            count(pool_of(2))

    callers = [threading.Thread(target=repeat, args=(count,)) for _, count in counts]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_S)
    for counters, _ in counts:
        assert Counter(counters.tolist()) == {2000: len(counters) - 1, 0: 1}


FORK = """
import os, warnings
warnings.simplefilter("ignore")  # a process with threads is forked here: that is the point
from kernels.test_pool import Job, counting, pool_of, run, wait_until_parked

def check_in_child():
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        return
    counters, count = counting(100)
    for _ in range(10):
        count(pool_of(3))
    os._exit(0 if (counters[:-1] == 10).all() else 1)

def in_a_job(args, chunk, slot):
    if slot == 0:
        check_in_child()

counters, count = counting(100)
count(pool_of(3))
check_in_child()
wait_until_parked(pool_of(3))
check_in_child()
run(pool_of(3), Job(in_a_job), 3)
count(pool_of(3))  # and nothing is amiss in the parent
assert (counters[:-1] == 2).all()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_run_in_a_forked_process_needs_no_helpers():
    """The helpers stay behind in the parent, awake, asleep or in the middle of a job."""
    assert run_python(FORK) == "done\n"
