"""Reads text from an argument or from standard input."""

from __future__ import annotations

import io
import sys

from phicore.errors import ArgumentError


def read_text(text: str | None) -> str:
    """Return the text of an argument, or read standard input if it is "-" or missing.

    One newline at the end of standard input is dropped.

    Raises:
        ArgumentError: If there is no text, or it is not valid.
    """
    if text is None or text == "-":
        return _read_stdin(is_asked=text == "-")
    try:
        text.encode()
    except UnicodeEncodeError:  # Python turns an argument's invalid bytes into lone surrogates
        raise ArgumentError("the text is not valid UTF-8") from None
    return text


def _read_stdin(is_asked: bool) -> str:
    if sys.stdin is None:
        raise ArgumentError("no text: standard input is closed; give it as an argument")
    if not is_asked and sys.stdin.isatty():
        raise ArgumentError("no text: give it as an argument, or - to read standard input")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # in the C locale, Python would accept invalid bytes
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"standard input is not {error.encoding} text: {error}") from None
    if not text and not is_asked:
        raise ArgumentError("no text: standard input is empty; give it as an argument")
    return text
