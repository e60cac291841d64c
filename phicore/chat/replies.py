"""What commands reply, and helpers that several of them use."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from phicore.chat.answering import Answering
from phicore.chat.conversation import Turn
from phicore.errors import ArgumentError


@dataclass(frozen=True)
class Reply:
    """What a command asks the program to show or to do.

    Attributes:
        lines: Lines to show.
        rows: The rows of a table to show; the first one is its head.
        answering: An answer to run and show.
        draft: A text that the user will change and send; `edits` says for what.
        edits: Whether the draft replaces the last message.
        copied: A text for the clipboard.
        turn: A turn to show, since it is now the last one.
        ends: Whether the chat ends.
    """

    lines: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    answering: Answering | None = None
    draft: str | None = None
    edits: bool = False
    copied: str | None = None
    turn: Turn | None = None
    ends: bool = False


def integer(name: str, text: str, expected: str) -> int:
    """Return the integer that an argument says.

    Raises:
        ArgumentError: If it says none.
    """
    with suppress(ValueError):
        return int(text)
    raise ArgumentError(parameter=name, expected=expected, got=text)


def count_of(count: int, noun: str) -> str:
    """Return a number of things in words, such as "1 turn" and "2 turns"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def short(text: str, most: int = 50) -> str:
    """Return a text in a line of at most this many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
