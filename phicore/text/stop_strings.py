"""Stop strings, which may span tokens."""

from __future__ import annotations

from collections.abc import Sequence

from phicore.errors import ArgumentError


class StopStrings:
    """Passes text on, up to the first stop string, and holds back what may be the start of one."""

    def __init__(self, stops: str | Sequence[str]) -> None:
        self._stops = checked_stops(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """The text that is certain now. Nothing comes after a stop string."""
        if self.is_stopped:
            return ""
        text, self._held = self._held + text, ""
        found = [(i + len(s), i) for s in self._stops if (i := text.find(s)) >= 0]
        if found:  # the one that ends first, so that it does not matter how the text was cut
            self.is_stopped = True
            return text[: min(found)[1]]
        held = max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        return text


def checked_stops(stops: str | Sequence[str]) -> tuple[str, ...]:
    """One stop string, or several, as a tuple.

    Raises:
        ArgumentError: If one is empty or no string.
    """
    if isinstance(stops, str):
        stops = [stops]
    if not isinstance(stops, Sequence) or any(not isinstance(s, str) or not s for s in stops):
        expected = "strings of at least one character"
        raise ArgumentError(parameter="stop", expected=expected, got=stops)
    return tuple(stops)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that is a start of the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
