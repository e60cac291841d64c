'''Messages of several lines: a block that begins and ends with """.'''

from __future__ import annotations

import re

QUOTES = '"""'


def is_open(text: str) -> bool:
    """Return whether a message, or a command's argument, begins a block and does not end it."""
    start = re.sub(r"^\s*/\w+\s+", "", text).lstrip()
    return start.startswith(QUOTES) and QUOTES not in start[len(QUOTES) :]


def content(text: str) -> str:
    """Return a text without the quotes of a block, if it is one."""
    stripped = text.strip()
    if not stripped.startswith(QUOTES):
        return text.rstrip("\n")
    inner, _, after = stripped[len(QUOTES) :].partition(QUOTES)
    return (inner.strip("\n") + (f"\n{after.strip()}" if after.strip() else "")).rstrip("\n")
