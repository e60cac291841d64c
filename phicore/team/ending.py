"""The end of a process whose team is not complete any more."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def end_at_exit() -> None:
    """End this process at once when Python exits.

    The tensor library would wait there for processes that are gone, and then abort.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)


def end(problem: str) -> NoReturn:
    """Tell the reason, and end this process at once.

    Nothing else would end it: a thread waits within the tensor library for devices of processes
    that are gone, and cannot be interrupted.
    """
    print(f"phicore: {problem}", file=sys.stderr, flush=True)
    os._exit(1)
