"""Stop strings, which end an answer and may span several tokens."""

from __future__ import annotations

from collections.abc import Sequence

from phicore.errors import ArgumentError


class StopStrings:
    """Passes on text up to the first stop string. It holds back the possible start of one."""

    def __init__(self, stops: str | Sequence[str]) -> None:
        self._stops = checked_stops(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Add text, and return what is certain to come before a stop string, perhaps ""."""
        if self.is_stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [(i + len(s), i) for s in self._stops if (i := text.find(s)) >= 0]
        if found:  # take the one that ends first, so that the division into tokens has no influence
            self.is_stopped = True
            return text[: min(found)[1]]
        held = max((overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return the text that was held back, since no more text follows."""
        text, self._held = self._held, ""
        return text


def checked_stops(stops: str | Sequence[str]) -> tuple[str, ...]:
    """Return one or several stop strings as a tuple.

    Raises:
        ArgumentError: If a stop string is empty or not a string.
    """
    if isinstance(stops, str):
        stops = [stops]
    if not isinstance(stops, Sequence) or any(not isinstance(s, str) or not s for s in stops):
        expected = "strings of at least one character"
        raise ArgumentError(parameter="stop", expected=expected, got=stops)
    return tuple(stops)


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of the text that is a prefix of the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
