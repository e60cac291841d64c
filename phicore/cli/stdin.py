"""Reads text from an argument, a file or standard input."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from phicore.errors import ArgumentError


def read_text(text: str | None, *, exact: bool = False) -> str:
    """Return the text of an argument, or read standard input if it is "-" or missing.

    Args:
        text: The argument.
        exact: Whether to keep a newline at the end of standard input. If False, one is dropped.
    Raises:
        ArgumentError: If there is no text, or it is not valid.
    """
    if text is None or text == "-":
        return _read_stdin(is_asked=text == "-", exact=exact)
    try:
        text.encode()
    except UnicodeEncodeError:  # Python turns an argument's invalid bytes into lone surrogates
        raise ArgumentError("the text is not valid UTF-8") from None
    return text


def read_file(path: Path, *, exact: bool = False, parameter: str = "file") -> str:
    """Read a text file, or standard input if the path is "-".

    Args:
        path: The file. A byte order mark at its start is dropped.
        exact: Whether to keep a newline at the end. If False, one is dropped.
        parameter: The parameter that names the file, for errors.
    Raises:
        ArgumentError: If it cannot be read, is not UTF-8, or is empty.
    """
    if str(path) == "-":
        return _read_stdin(is_asked=True, exact=exact)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}", parameter=parameter) from None
    except UnicodeDecodeError:
        raise ArgumentError(f"{path}: not UTF-8 text", parameter=parameter) from None
    text = text if exact else text.removesuffix("\n")
    if not text:
        raise ArgumentError(f"{path}: no text in it", parameter=parameter)
    return text


def _read_stdin(*, is_asked: bool, exact: bool) -> str:
    if sys.stdin is None:
        raise ArgumentError("no text: standard input is closed; give the text as an argument")
    if not is_asked and sys.stdin.isatty():
        raise ArgumentError("no text: give it as an argument, or - to read standard input")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="strict")  # in the C locale, Python would accept invalid bytes
    try:
        text = sys.stdin.read().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"standard input is not {error.encoding} text: {error}") from None
    text = text if exact else text.removesuffix("\n")
    if not text:
        raise ArgumentError("no text: standard input is empty; give the text as an argument")
    return text
