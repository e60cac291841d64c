"""Where answers of `phicore chat` go: a terminal, a pipe, or nowhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

from phicore.cli.terminal import printable


class Output(Protocol):
    """Shows an answer."""

    def push(self, text: str) -> None:
        """Show a piece of text."""
        ...

    def close(self) -> None:
        """Show the rest."""
        ...


class PlainOutput:
    """Writes an answer to standard output as it is, without control characters on a terminal."""

    def __init__(self) -> None:
        self._shown: Callable[[str], str] = printable if sys.stdout.isatty() else str
        self._ends_line = True

    def push(self, text: str) -> None:
        if text:
            sys.stdout.write(self._shown(text))
            sys.stdout.flush()
            self._ends_line = text.endswith("\n")

    def close(self) -> None:
        sys.stdout.write("" if self._ends_line else "\n")
        sys.stdout.flush()


class Silence:
    """Shows nothing."""

    def push(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
