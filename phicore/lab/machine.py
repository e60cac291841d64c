"""Facts about the machine for `phicore bench`: the CPU's name and the memory bandwidth."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np

from phicore.backend.host import cpu_count, cpu_name

__all__ = ["MemoryBandwidth", "cpu_name"]

READ_BYTES = 2**30  # several times the last-level cache of most servers
READ_PASSES = 4  # so that starting the threads does not count


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
