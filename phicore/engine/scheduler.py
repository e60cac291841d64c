"""Decides who is read next, how much of a prompt at once, and how many rows a batch has.

This is host code that knows neither backends nor arrays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens
from typing import Any

from phicore.engine.drafts import NO_DRAFT, Draft, Outlook, Plan
from phicore.engine.sequence import Sequence
from phicore.errors import BusyError

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Batches have one of these numbers of rows, so that steps are compiled for few of them."""
MAX_SEQUENCES = 8
"""The default for the largest number of sequences that are computed together."""
PATIENCE = 32
"""A batch keeps a row that nobody needs for this many steps, since somebody may come."""
BUDGET_S = 0.1
"""Running answers wait at most about this long while a part of a prompt is read."""
OLDEST_EVERY = 4
"""Every so many chunks, the oldest prompt that is read gets one."""
NEWEST = 0.3
"""The weight of the newest measurement in the time that a token of a prompt takes."""
STEP_SIZES = (2, 4, 8)
"""A step that checks drafts runs one of these numbers of tokens of each row."""
MOST_CHECKED = 16
"""The largest number of tokens, of all rows together, that a step runs to check drafts."""
TOKEN_COST = 0.25
"""A step of one row takes about this part of its time longer for each further token, as long as
nothing was measured."""
GAIN = 1.1
"""Drafts are checked if this is expected to give so many times as many tokens in the same time."""
LONGEST = 3
"""A step counts as if it had taken at most so many times as long as was thought."""
FORGET = 1 / 256
"""The part of what a step takes longer than was thought that is forgotten at each chance to run
it, so that one bad measurement does not count for ever."""


class Scheduler:
    """The queue of sequences that wait, and the rules by which they are served.

    The first to come gets a row first. Of the prompts that are read, the one with the fewest tokens
    left gets the next chunk, so that a short prompt does not wait for a long one. Every fourth
    chunk is for the oldest one, so that it does not wait for ever. The answers of others go on
    between the chunks.

    Attributes:
        waiting: The sequences that wait, the next one first.
        max_sequences: The largest number of sequences that are read or decoded at a time.
        max_waiting: The largest number of sequences that may wait; None sets no limit.
        chunk_s: About the longest time in seconds that a part of a prompt is read at once while no
            answer waits for it; None sets no limit. Requests that come or are aborted meanwhile
            wait for this.
        steps_s: The time of steps in seconds, by the numbers of rows and of tokens of each row.
    """

    def __init__(
        self, *, max_sequences: int = MAX_SEQUENCES, max_waiting: int | None = None
    ) -> None:
        self.max_sequences = min(max_sequences, SIZES[-1])
        self.max_waiting = max_waiting
        self.chunk_s: float | None = None
        self.waiting: deque[Sequence] = deque()
        self._token_s: float | None = None
        self._chunks = 0
        self.steps_s: dict[tuple[int, int, bool], float] = {}

    def add(self, sequence: Sequence) -> None:
        """Add a sequence at the end of the queue.

        Raises:
            BusyError: If too many sequences wait already.
        """
        if self.max_waiting is not None and len(self.waiting) >= self.max_waiting:
            raise BusyError(f"{len(self.waiting)} requests are waiting already; try again later")
        self.waiting.append(sequence)

    def next_to_read(self, running: int) -> Sequence | None:
        """Remove the next sequence from the queue and return it, if there is room for it.

        Args:
            running: The number of sequences that are read or decoded.
        """
        if not self.waiting or running >= self.max_sequences:
            return None
        return self.waiting.popleft()

    def next_chunk(self, reading: list[Sequence]) -> int:
        """Return the index of the sequence that reads the next chunk.

        Args:
            reading: The sequences that are read, the oldest first.
        """
        self._chunks += 1
        if self._chunks % OLDEST_EVERY == 0:
            return 0
        left = [sequence.given - sequence.computed for sequence in reading]
        return left.index(min(left))

    def most_tokens(self, others: int) -> int | None:
        """Return how many tokens of a prompt may be read at once; None means any number.

        Args:
            others: The number of sequences whose answers wait meanwhile.
        """
        budget_s = BUDGET_S if others else self.chunk_s
        if budget_s is None or (self._token_s is None and not others):
            return None
        return 1 if self._token_s is None else max(1, int(budget_s / self._token_s))

    def measured(self, tokens: int, seconds: float) -> None:
        """Take note of the time in which a part of a prompt was read."""
        token_s = seconds / tokens
        if self._token_s is not None:
            token_s = (1 - NEWEST) * self._token_s + NEWEST * token_s
        self._token_s = token_s

    # ---- drafts ----------------------------------------------------------------------------

    @staticmethod
    def step_sizes(rows: int) -> tuple[int, ...]:
        """Return the numbers of tokens that steps which check drafts of so many rows may have."""
        return tuple(size for size in STEP_SIZES if rows * size <= MOST_CHECKED)

    def step_took(self, rows: int, size: int, seconds: float, *, is_drawn: bool = False) -> None:
        """Take note of the time of a step of `rows` rows with `size` tokens each.

        Whether tokens are drawn counts, since a draw of many tokens takes a small model longer than
        its network does.

        A time that is far too long counts in part, since others may have used the processor.
        """
        known = self.steps_s.get((rows, size, is_drawn))
        thought = self._step_s(rows, size, is_drawn)
        if thought is not None:
            seconds = min(seconds, LONGEST * thought)
        if known is not None:
            seconds = (1 - NEWEST) * known + NEWEST * seconds
        self.steps_s[rows, size, is_drawn] = seconds

    def _step_s(self, rows: int, size: int, is_drawn: bool) -> float | None:
        """Return the time of a step, as measured or as expected; None if nothing is known."""
        found = self.steps_s.get((rows, size, is_drawn))
        return self._expected_s(rows, size, is_drawn) if found is None else found

    def _expected_s(self, rows: int, size: int, is_drawn: bool) -> float | None:
        """Return the time that a step is expected to take, from that of a step of one token."""
        one_s = self.steps_s.get((rows, 1, is_drawn))
        if one_s is None:
            return None
        # A row takes a step longer, too.
        return one_s * (1 + TOKEN_COST * rows * (size - 1) / (1 + TOKEN_COST * (rows - 1)))

    def plan_wanted(
        self,
        rows: int,
        most: int,
        sequences: Tokens[Sequence],
        plans: Tokens[Plan],
        *,
        is_drawn: bool = False,
    ) -> tuple[int, Plan | None]:
        """Return how many tokens of each row the next step should run, and how they are drafted.

        Returns:
            The number and the plan that give the most tokens in the same time; 1 and None if no
            plan pays. The other arguments are those of `step_wanted`.
        """
        best: tuple[float, int, Plan | None] = (-1.0, 1, None)
        for plan in plans:
            drafts = [plan.outlooks.get(sequence, NO_DRAFT) for sequence in sequences]
            about: dict[str, Any] = {"token_s": plan.token_s, "is_drawn": is_drawn}
            size = self.step_wanted(rows, most, drafts, **about)
            rate = self._rate(rows, size, drafts, **about)
            if size > 1 and rate > best[0]:
                best = rate, size, plan
        return best[1:]

    def step_wanted(
        self,
        rows: int,
        most: int,
        drafts: Tokens[Draft | Outlook],
        *,
        token_s: float = 0.0,
        is_drawn: bool = False,
    ) -> int:
        """Return how many tokens of each row the next step should run; 1 checks no draft.

        It is the number with the most expected tokens of all sequences in the same time. A row
        whose draft is short waits for the others, so it counts with what it gets.

        Args:
            rows: The number of rows, those without a sequence included.
            most: The largest number of tokens that every row has room for.
            drafts: The draft of each sequence, or what is known of it.
            token_s: The time in seconds that each token of the drafts takes.
            is_drawn: Whether tokens of the rows are drawn.
        """
        best, best_rate = 1, 0.0
        one_s = self._step_s(rows, 1, is_drawn)
        if one_s is None or not any(draft.length for draft in drafts):
            return 1
        one_rate = len(drafts) / one_s
        for size in self.step_sizes(rows):
            expected_s = self._expected_s(rows, size, is_drawn) or one_s
            step_s = self._step_s(rows, size, is_drawn) or one_s
            rate = self._rate(rows, size, drafts, token_s=token_s, is_drawn=is_drawn)
            if size <= most and rate >= GAIN * one_rate and rate > best_rate:
                best, best_rate = size, rate
            elif step_s > expected_s:
                self.steps_s[rows, size, is_drawn] = step_s - FORGET * (step_s - expected_s)
        return best

    def _rate(
        self,
        rows: int,
        size: int,
        drafts: Tokens[Draft | Outlook],
        *,
        token_s: float,
        is_drawn: bool,
    ) -> float:
        """Return the expected number of tokens a second with steps of this size; 0 if unknown."""
        step_s = self._step_s(rows, size, is_drawn) or self._step_s(rows, 1, is_drawn)
        if not step_s:
            return 0.0
        tokens = sum(tokens_expected(draft, size) for draft in drafts)
        return tokens / (step_s + token_s * (size - 1))

    @staticmethod
    def rows_wanted(rows: int, needed: int, idle: int) -> int:
        """Return the number of rows that a batch should have.

        Args:
            rows: The number of rows that it has.
            needed: The number of sequences that it is to hold.
            idle: The number of steps since a smaller size would do.
        """
        size = next(size for size in SIZES if size >= needed)
        if size >= rows or 2 * size <= rows or idle >= PATIENCE:
            return size
        return rows


def tokens_expected(draft: Draft | Outlook, size: int) -> float:
    """Return how many tokens a step of `size` tokens is expected to give a sequence."""
    right, expected = 1.0, 1.0
    for _ in range(min(draft.length, size - 1)):
        right *= draft.chance
        expected += right
    return expected
