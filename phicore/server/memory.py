"""Memory that the libraries of a resting process have freed, and the system does not have yet."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress


def give_back() -> None:
    """Give the memory that nothing uses back to the system, where that is possible.

    Compilers free many small pieces between those that stay, so that glibc keeps all of them; see
    `malloc_trim(3)`. Other libraries of C do not have this.
    """
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
