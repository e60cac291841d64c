"""Interrupts that a library swallows."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def swallowed_interrupts() -> Iterator[list[object]]:
    """Collect every Ctrl-C: a library may catch its exception, or Python can only report it.

    JAX loses some of those that come while it compiles. Whoever uses this raises KeyboardInterrupt
    once more, as soon as the library returns.
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
