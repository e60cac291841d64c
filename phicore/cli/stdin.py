"""Standard input: what the commands read besides their arguments."""

from __future__ import annotations

import io
import sys

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
