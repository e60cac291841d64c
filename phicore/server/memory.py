"""Memory of a server that libraries have freed, and that glibc keeps.

Compilers free many small pieces between those that stay. Other libraries of C are left as they are.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress

M_ARENA_MAX = -8
"""The parameter of `mallopt(3)` for the number of arenas."""
ARENAS = 2
"""Usually each thread has an arena, up to eight for each processor. With two, 160 MB lay unused
between pieces that stay after ten minutes of a crowd, and 270 MB without this (one run each)."""


def use_few_arenas() -> None:
    """Let threads that start from now on share their memory, unless the user has decided that."""
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with suppress(AttributeError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Give the memory that nothing uses back to the system; see `malloc_trim(3)`."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
