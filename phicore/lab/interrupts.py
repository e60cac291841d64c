"""Detects interrupts that a library swallows."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def swallowed_interrupts() -> Iterator[list[object]]:
    """Record every Ctrl-C in a list, even if its KeyboardInterrupt does not reach the caller.

    A library may catch the exception, or Python can only report it. For example, JAX loses some
    interrupts while it compiles. If the list is not empty after a call of the library, the caller
    must raise KeyboardInterrupt again.
    """
    found: list[object] = []
    report = sys.unraisablehook

    def interrupt(*_: object) -> NoReturn:
        found.append(KeyboardInterrupt)
        raise KeyboardInterrupt

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            found.append(unraisable.exc_type)
        else:
            report(unraisable)

    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    sys.unraisablehook = hook
    if is_ours:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield found
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = report
