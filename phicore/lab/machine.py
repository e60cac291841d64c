"""Facts about the machine for `phicore bench`: the CPU's name and the memory bandwidth."""

from __future__ import annotations

import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import numpy as np

from phicore.backend.host import cpu_count

READ_BYTES = 2**30  # several times the last-level cache of most servers
READ_PASSES = 4  # so that starting the threads does not count


def cpu_name() -> str:
    """Return the name of the CPU, or that of its architecture if the system does not tell it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class MemoryBandwidth:
    """Measures memory bandwidth by reading a large array on all CPUs at once.

    It is a context manager.

    Attributes:
        samples: The results of `sample`, in bytes per second.
    """

    def __init__(self) -> None:
        self.samples: list[float] = []
        array = np.ones(READ_BYTES // 8, np.int64)  # pages never written would all be one page
        self._parts = np.array_split(array, cpu_count())
        self._pool = ThreadPoolExecutor(len(self._parts))

    def sample(self) -> None:
        started = time.perf_counter()
        list(self._pool.map(_read, self._parts))
        self.samples.append(READ_PASSES * READ_BYTES / (time.perf_counter() - started))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()


def _read(part: np.ndarray) -> None:
    for _ in range(READ_PASSES):
        part.max()  # cheap arithmetic, and NumPy releases Python's lock
