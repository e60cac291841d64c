"""Decides who is read next, how much of a prompt at once, and how many rows a batch has.

This is host code that knows neither backends nor arrays.
"""

from __future__ import annotations

from collections import deque

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
