"""The function type with which long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the amount that is done, and the total amount."""


AGAIN = "reading again with the long rotary factors"
"""The name of work that a text waits for when it grows beyond LongRoPE's original context."""


def silent(what: str, done: int, total: int) -> None:
    """Ignore progress."""
