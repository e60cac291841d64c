"""What an engine tells the engines that compute the same model with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from phicore.engine.sequence import Output, Sequence

T = TypeVar("T")


class Team:
    """The engines that compute a model together. This one computes alone, and tells nobody.

    Where several processes share a model, each has an engine, and all make the same calls to their
    devices in the same order. So they need to hear of all that decides which calls an engine makes:
    the requests that come and go, and whatever depends on the time. The engine holds its lock
    whenever it calls a method, except for `call`.
    """

    is_alone = True

    def added(self, sequence: Sequence) -> None:
        """Take note that a sequence waits.

        Raises:
            ArgumentError: If its request cannot be told to others. It then does not wait.
        """

    def aborted(self, sequence: Sequence) -> None:
        """Take note that a sequence is about to be ended, since nobody wants it any more."""

    def step(self, run: Callable[[], list[Output]]) -> list[Output]:
        """Run a step, as all others do; return its outputs."""
        return run()

    def call(self, name: str, args: tuple[Any, ...], run: Callable[[], T]) -> T:
        """Run a method of the engine, which all others call with the same arguments."""
        return run()

    def close(self) -> None:
        """Let the others end."""

    def agreed(self, value: T) -> T:
        """Return the value that all use, of those that each has found."""
        return value


ALONE = Team()
