'''Messages of several lines: a block that begins and ends with """.'''

from __future__ import annotations

import re

QUOTES = '"""'


def is_open(text: str) -> bool:
    """Return whether a message, or a command's argument, begins a block and does not end it."""
    start = re.sub(r"^\s*/\w+\s+", "", text).lstrip()
    return start.startswith(QUOTES) and QUOTES not in start[len(QUOTES) :]


def content(text: str) -> str:
    """Return a text without the quotes of a block, if it is one.

    A text that only begins with quotes, such as a pasted program, stays as it is.
    """
    stripped = text.strip()
    inner = stripped.removeprefix(QUOTES)
    if inner == stripped or (QUOTES in inner and inner.index(QUOTES) < len(inner) - len(QUOTES)):
        return text.rstrip("\n")
    return inner.removesuffix(QUOTES).strip("\n")
