"""A conversation: a tree of turns, and the way through it that the model sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from phicore.errors import ArgumentError


def now() -> str:
    """Return the local time with its offset from UTC, in the format of ISO 8601."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message of the user, its answer, and everything that is needed to compute it again.

    Attributes:
        number: The number in the conversation, from 1.
        parent: The number of the turn before; None for a first turn.
        user: The user's message.
        answer: The answer's text.
        finish_reason: "stop", "length", "context", or "interrupted".
        seed: The seed of the answer.
        system: The system message; None means that there was none.
        dropped: The number of oldest turns that the model did not see.
        options: The sampling parameters, `max_tokens`, `stop` and `processors`.
        model: The reference of the model.
        backend: The name of the backend.
        prompt_tokens: The number of tokens of the prompt.
        cached_tokens: The number of the prompt's tokens that were known before.
        generated_tokens: The number of tokens of the answer.
        created: The time at which the message was sent, as ISO 8601.
    """

    number: int
    parent: int | None
    user: str
    answer: str = ""
    finish_reason: str = "interrupted"
    seed: int
    system: str | None = None
    dropped: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    backend: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    created: str = field(default_factory=now)

    @property
    def is_lost(self) -> bool:
        """Return whether the program was killed before it could keep anything of the answer."""
        return self.finish_reason == "interrupted" and not self.answer


@dataclass
class Conversation:
    """A tree of turns. /retry and /edit add branches, and nothing is removed from it.

    Attributes:
        name: The name of its file, without the ending; "" until it has one.
        system: The system message of the next turn; None means that there is none.
        settings: The parameters that the user has set, by name.
        turns: All turns, in the order of their numbers.
        current: The number of the turn after which the next one comes; None is the beginning.
        dropped: The number of oldest turns that the model does not see any more.
        created: The time at which it was begun, as ISO 8601.
    """

    name: str = ""
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    current: int | None = None
    dropped: int = 0
    created: str = field(default_factory=now)
    _undone: list[int] = field(default_factory=list, compare=False, repr=False)

    @property
    def title(self) -> str:
        """Return the first line of the first message."""
        return self.turns[0].user.strip().partition("\n")[0] if self.turns else ""

    @property
    def last(self) -> Turn | None:
        """Return the turn after which the next one comes."""
        return None if self.current is None else self.turn(self.current)

    def turn(self, number: int) -> Turn:
        """Return the turn with a number."""
        return next(turn for turn in self.turns if turn.number == number)

    def path(self, end: int | None) -> list[Turn]:
        """Return the turns from the first one to the turn `end`; None is the beginning."""
        by_number = {turn.number: turn for turn in self.turns}
        found: list[Turn] = []
        while end is not None:
            found.append(by_number[end])
            end = found[-1].parent
        return found[::-1]

    def messages(
        self, user: str, parent: int | None, *, system: str | None, dropped: int
    ) -> list[dict[str, str]]:
        """Return the messages of a prompt: a user's message after the turn `parent`.

        Args:
            dropped: The number of oldest turns that are left out. The system message stays.
        """
        found = [] if system is None else [{"role": "system", "content": system}]
        for turn in self.path(parent)[dropped:]:
            found.append({"role": "user", "content": turn.user})
            found.append({"role": "assistant", "content": turn.answer})
        return [*found, {"role": "user", "content": user}]

    def messages_of(self, turn: Turn) -> list[dict[str, str]]:
        """Return the messages of the prompt that a turn's answer was made for."""
        return self.messages(turn.user, turn.parent, system=turn.system, dropped=turn.dropped)

    def children(self, number: int | None) -> list[Turn]:
        """Return the turns that follow a turn; None is the beginning."""
        return [turn for turn in self.turns if turn.parent == number]

    # ---- changes -------------------------------------------------------------------------------

    def add(self, turn: Turn) -> None:
        """Add a turn, or replace the turn of its number, and go to it."""
        self.turns = [*(t for t in self.turns if t.number != turn.number), turn]
        self._undone.clear()
        self.go(turn.number)

    @property
    def next_number(self) -> int:
        """Return the number of a new turn."""
        return max((turn.number for turn in self.turns), default=0) + 1

    def discard(self, number: int) -> None:
        """Remove a turn that nothing follows, and go to the turn before."""
        turn = self.turn(number)
        self.turns.remove(turn)
        self.go(turn.parent)

    def go(self, number: int | None) -> None:
        """Let the next turn come after the turn with this number."""
        self.current = number
        self.dropped = min(self.dropped, len(self.path(number)))

    def undo(self, count: int = 1) -> list[Turn]:
        """Go back by some turns, which stay in the tree, and return them.

        Raises:
            ArgumentError: If there are fewer.
        """
        path = self.path(self.current)
        if not 1 <= count <= len(path):
            raise ArgumentError(_too_many("undo", count, len(path)))
        self._undone += [turn.number for turn in path[: -count - 1 : -1]]
        self.go(path[-count].parent)
        return path[-count:]

    def redo(self) -> Turn:
        """Go to the turn that was undone last, or to the newest one that follows, and return it.

        Raises:
            ArgumentError: If none follows.
        """
        following = self.children(self.current)
        if not following:
            raise ArgumentError("there is no turn after this one")
        numbers = [turn.number for turn in following]
        undone = self._undone.pop() if self._undone else None
        self.go(undone if undone in numbers else numbers[-1])
        return following[numbers.index(self.current or 0)]

    def alternatives(self) -> list[Turn]:
        """Return the turns in the place of the current one, with itself."""
        return [] if self.last is None else self.children(self.last.parent)

    def drop(self, count: int) -> None:
        """Hide the oldest turns that the model still sees from it.

        Raises:
            ArgumentError: If there are fewer.
        """
        left = len(self.path(self.current)) - self.dropped
        if not 1 <= count <= left:
            raise ArgumentError(_too_many("drop", count, left))
        self.dropped += count

    def emptied(self) -> Conversation:
        """Return a new conversation with the same system message and settings."""
        return Conversation(system=self.system, settings=dict(self.settings))

    def renamed(self, name: str) -> Conversation:
        """Return this conversation with another name."""
        return replace(self, name=name)


def _too_many(command: str, count: int, left: int) -> str:
    if left == 0:
        return f"there is no turn to {command}"
    return f"expected a number of turns from 1 to {left}, got {count}"
