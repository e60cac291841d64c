"""Reads text from an argument or from standard input."""

from __future__ import annotations

import io
import sys
from pathlib import Path

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


def read_file(path: Path) -> str:
    """Read a text file; one newline at its end does not count.

    Raises:
        ArgumentError: If it cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}", parameter="file") from None
    except UnicodeDecodeError:
        raise ArgumentError(f"{path}: not UTF-8 text", parameter="file") from None
    if not text:
        raise ArgumentError(f"{path}: no text in it", parameter="file")
    return text


def _read_stdin(is_asked: bool) -> str:
    if sys.stdin is None:
        raise ArgumentError("no text: standard input is closed; give the text as an argument")
    if not is_asked and sys.stdin.isatty():
        raise ArgumentError("no text: give it as an argument, or - to read standard input")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # in the C locale, Python would accept invalid bytes
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"standard input is not {error.encoding} text: {error}") from None
    if not text and not is_asked:
        raise ArgumentError("no text: standard input is empty; give the text as an argument")
    return text
