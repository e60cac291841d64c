"""Writes arrays to a store in the background, while the process has nothing else to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from phicore.disk.arrays import Arrays
from phicore.disk.store import ArrayStore, Key

WAIT_S = 0.25
PATIENCE_S = 5.0

_threads: list[threading.Thread] = []


def write_later(
    store: ArrayStore, key: Key, arrays: Arrays, is_busy: Callable[[], bool]
) -> threading.Thread:
    """Write arrays in a thread, in the moments when the process is not busy.

    What is not written when the main thread ends is written then, before the process ends. A
    process that is still busy after `PATIENCE_S` writes a piece every `WAIT_S`.

    Args:
        arrays: The arrays, which nobody changes any more.
        is_busy: Returns whether somebody waits for the process now.
    """
    deadline_s = time.monotonic() + PATIENCE_S

    def pause() -> None:
        while is_busy() and threading.main_thread().is_alive():
            time.sleep(WAIT_S)
            if time.monotonic() > deadline_s:
                return

    thread = threading.Thread(
        target=lambda: store.put(key, arrays, pause), name="phicore-packed-cache"
    )
    _threads[:] = [*(t for t in _threads if t.is_alive()), thread]
    thread.start()
    return thread


def is_writing() -> bool:
    """Return whether a thread of `write_later` has not ended."""
    return any(thread.is_alive() for thread in _threads)
