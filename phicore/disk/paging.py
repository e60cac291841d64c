"""Moves files between memory and disk before anybody waits for it."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from contextlib import suppress

import numpy as np

MADV_POPULATE_READ = 22  # Linux 5.14; older systems refuse it
STEP_BYTES = 64 << 20
SYNC_FILE_RANGE_WRITE = 2


def prefer_huge_pages(view: mmap.mmap) -> None:
    """Let the system read a file into huge pages where it can, so that each fault maps 2 MiB."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            view.madvise(mmap.MADV_HUGEPAGE)


def read_ahead(view: mmap.mmap) -> threading.Thread | None:
    """Read a mapped file in order, in a thread that does not hold Python's lock.

    A process that computes reads a file in many places at a time, which is several times slower.
    """
    if not sys.platform.startswith("linux"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    contents = np.frombuffer(view, np.uint8)  # keeps the map

    def read() -> None:
        first, size = contents.ctypes.data, contents.size
        for start in range(0, size, STEP_BYTES):
            step = min(STEP_BYTES, size - start)
            if madvise(first + start, step, MADV_POPULATE_READ) != 0:
                return

    thread = threading.Thread(target=read, name="phicore-read-ahead", daemon=True)
    thread.start()
    return thread


def begin_to_write_back(fd: int, start: int, size: int) -> None:
    """Let the disk begin to write a part of a file, so that a later fsync has less to wait for."""
    if not sys.platform.startswith("linux"):
        return
    sync_file_range = ctypes.CDLL(None).sync_file_range
    sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    sync_file_range(fd, start, size, SYNC_FILE_RANGE_WRITE)
