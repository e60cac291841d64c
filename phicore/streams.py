"""Standard input, and interrupts: what the commands read, besides their arguments."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from phicore.errors import ArgumentError


def read_text(text: str | None) -> str:
    """An argument, or standard input for "-" and in a pipe; one final newline does not count."""
    if text is None or text == "-":
        return _read_stdin(is_asked=text == "-")
    try:
        text.encode()
    except UnicodeEncodeError:  # Python keeps such bytes of an argument as lone surrogates
        raise ArgumentError("the text is not valid UTF-8") from None
    return text


def _read_stdin(is_asked: bool) -> str:
    if sys.stdin is None:
        raise ArgumentError("no text: standard input is closed; give it as an argument")
    if not is_asked and sys.stdin.isatty():
        raise ArgumentError("no text: give it as an argument, or - to read standard input")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # the C locale lets bytes through that are no text
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"standard input is not {error.encoding} text: {error}") from None
    if not text and not is_asked:
        raise ArgumentError("no text: standard input is empty; give it as an argument")
    return text


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
