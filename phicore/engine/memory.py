"""The memory for keys and values: who fits into it, and which cache a sequence begins with."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Tokens

import numpy as np

from phicore.engine.cache import Cache
from phicore.engine.chunks import MIN_CAPACITY
from phicore.engine.prefixes import SHORTEST, Prefix, Prefixes, common
from phicore.engine.rows import Rows
from phicore.engine.runner import Runner
from phicore.engine.scheduler import Scheduler
from phicore.engine.sequence import Sequence
from phicore.engine.steps import States
from phicore.errors import ArgumentError
from phicore.network.processors import Kinds

log = logging.getLogger(__name__)

EXPECTED_ANSWER = 512
"""A new cache has slots for the prompt and up to this many tokens of the answer. It can grow."""
GAIN = 8
"""A cache of N tokens is replaced by one that has N / 8 more, so copies take less than reading."""


class Memory:
    """The caches of keys and values of one model.

    Attributes:
        runner: The runner, which makes and copies caches.
        context: The largest number of tokens that a prompt and its answer may have together.
        most_bytes: The largest number of bytes of all caches together, without those of a drafter;
            None sets no limit.
        prefixes: What ended sequences have computed.
    """

    def __init__(
        self,
        runner: Runner,
        context: int,
        most_bytes: int | None,
        prefix_bytes: int,
        drafter_slot_bytes: int = 0,
    ) -> None:
        """Take account of memory.

        Args:
            most_bytes: The largest number of bytes of all caches, those of a drafter included.
            prefix_bytes: The largest number of bytes of `prefixes`.
            drafter_slot_bytes: The bytes of a drafter for each slot of these caches.
        """
        self._given_bytes = most_bytes
        self._slot_bytes = runner.slot_bytes + drafter_slot_bytes
        if most_bytes is not None:  # the drafter gets its share
            most_bytes = most_bytes * runner.slot_bytes // self._slot_bytes
        self.runner = runner
        self.context = context
        self.most_bytes = most_bytes
        self.prefixes = Prefixes(prefix_bytes, runner.config.sliding_window)

    def fit_context(self) -> None:
        """Reduce the context to what fits into `most_bytes`.

        Raises:
            ArgumentError: If no text fits.
        """
        if self.most_bytes is None:
            return
        most = self.runner.positions_in(self.most_bytes)
        if most == 0:
            least = MIN_CAPACITY * self._slot_bytes
            raise ArgumentError(
                parameter="kv_memory",
                expected=f"{least} bytes or more for this model",
                got=self._given_bytes,
            )
        self.context = self.context if most is None else min(self.context, most)

    def rows(
        self, cache: Cache, sequences: Tokens[Sequence | None], kinds: Kinds, states: States
    ) -> Rows:
        """Make the rows of sequences; see `Rows.of`."""
        return Rows.of(cache, sequences, kinds, states, context=self.context)

    def has_room_for(
        self, sequence: Sequence, all_rows: Tokens[Rows], scheduler: Scheduler
    ) -> bool:
        """Return whether a sequence fits beside those that run, however long all become.

        All rows of a batch have the capacity of the longest. The prefix cache makes way, except for
        what the sequence itself begins with.

        Args:
            all_rows: The rows of all sequences that have some.
            scheduler: Says how many rows batches have.
        """
        if self.most_bytes is None:
            return True
        others = [other for rows in all_rows for other in rows.live]
        if len(others) >= scheduler.max_sequences:
            return False  # so nothing needs to make way
        capacities = [rows.cache.capacity for rows in all_rows]
        lengths = [len(s.request.prompt_ids) + s.limit for s in [*others, sequence]]
        capacities.append(self.runner.capacity_for(max(lengths)))
        known, is_taken = self.prefixes.touch(sequence.tokens, is_long=sequence.is_long)
        copied = taken = 0
        if known is not None:
            capacities.append(known.cache.capacity)
            copied, taken = (0, known.cache.bytes) if is_taken else (known.cache.bytes, 0)
        # A row that is read has a cache of its own beside the batch, which may have unused rows.
        count = max(
            scheduler.rows_wanted(1, len(lengths), 0),
            1 + sum(len(rows.sequences) for rows in all_rows),
        )
        room = self.most_bytes - max(capacities) * count * self.runner.slot_bytes
        if room < copied and others:
            return False
        self.prefixes.shrink(max(room, 0) + taken)
        return True

    def cache_for(self, sequence: Sequence) -> Cache:
        """Return a cache for a sequence: with the first tokens of its prompt, if these are known.

        Its capacity is for the given tokens and a part of the answer.
        """
        found = self.prefixes.find(sequence.tokens, is_long=sequence.is_long)
        if found is None:
            return self.runner.new_cache(_length(sequence), sequence.is_long)
        prefix, count = found
        cache = prefix.cache
        capacity = self.runner.capacity_for(_length(sequence) - int(cache.first[0]))
        if count < len(prefix.tokens) or capacity > cache.capacity:
            cache = self._beginning(cache, 0, count, sequence)
        sequence.begin_at(count)
        return cache

    def _beginning(self, cache: Cache, index: int, count: int, sequence: Sequence) -> Cache:
        """Return a cache for a sequence, with a copy of the first `count` tokens of a row."""
        capacity = self.runner.capacity_for(_length(sequence) - int(cache.first[index]))
        return self.runner.copy(cache, [index], np.array([count]), capacity)

    def share(self, rows: Rows, all_rows: Tokens[Rows]) -> None:
        """Give a sequence that is read what another one has computed of the same first tokens.

        So the prompt of several answers is read once, as are the same first tokens of requests that
        come together.

        Args:
            rows: The rows that have the sequence alone.
            all_rows: The rows of all sequences that have some.
        """
        [sequence] = rows.live
        least = sequence.computed + max(SHORTEST, sequence.computed // GAIN)
        if least >= sequence.given or not self.prefixes.most_bytes:
            return
        wanted = sequence.tokens[: sequence.given]
        found = [
            (self._common(other, index, wanted, least), other, index)
            for other in all_rows
            for index, one in enumerate(other.sequences)
            if one not in (None, sequence) and one.is_long == sequence.is_long
        ]
        count, other, index = max(found, key=lambda each: each[0], default=(0, rows, 0))
        if count < least:
            return
        try:
            rows.cache = self._beginning(other.cache, index, count, sequence)
        except Exception as error:  # noqa: BLE001 - no memory left, for example
            log.warning("a prompt is read once more: %s", error)
            return
        sequence.begin_at(count)

    def _common(self, rows: Rows, index: int, wanted: Tokens[int], least: int) -> int:
        """Return how many of the wanted tokens a running sequence has computed, 0 for too few."""
        known = self._computed(rows, index)
        if len(known) < least or known[least - 1] != wanted[least - 1]:
            return 0  # at once, since there may be many long ones
        ids, first = np.array(wanted, np.int32), int(rows.cache.first[index])
        return common(np.array(known, np.int32), ids, first, self.prefixes.window)

    def _computed(self, rows: Rows, index: int) -> Tokens[int]:
        """Return the tokens of a running sequence whose keys and values its row surely has.

        The last token may not have been run. A sequence whose last tokens were not read yet may
        have used its last slots again.
        """
        sequence = rows.sequences[index]
        assert sequence is not None
        full = int(rows.cache.first[index]) + rows.cache.capacity
        full -= self.runner.ops.capabilities.steps
        return sequence.tokens[:-1][: min(sequence.computed, full)]

    def keep(self, rows: Rows, sequence: Sequence, all_rows: Tokens[Rows]) -> None:
        """Keep what an ended sequence has computed for others that begin the same way.

        Args:
            rows: The rows that have the sequence.
            all_rows: The rows of all sequences that have some, these included.
        """
        if sequence.finish_reason == "error" or not self.prefixes.most_bytes:
            return
        index, cache = rows.sequences.index(sequence), rows.cache
        first, tokens = int(cache.first[index]), self._computed(rows, index)
        if len(tokens) < SHORTEST or cache.bytes > len(rows.sequences) * self.prefixes.most_bytes:
            return
        is_alone = len(rows.sequences) == 1
        try:
            if not is_alone:
                room = self.runner.capacity_for(len(tokens) - first + EXPECTED_ANSWER)
                capacity, end = min(room, cache.capacity), np.array([len(tokens)])
                cache = self.runner.copy(cache, [index], end, capacity)
        except Exception as error:  # noqa: BLE001 - no memory left, for example
            log.warning("a prefix is not kept: %s", error)
            return
        self.prefixes.add(Prefix(np.array(tokens, np.int32), sequence.is_long, cache))
        if self.most_bytes is not None:
            others = [each for each in all_rows if not (is_alone and each is rows)]
            running = sum(each.cache.bytes for each in others)
            self.prefixes.shrink(max(self.most_bytes - running, 0))


def _length(sequence: Sequence) -> int:
    """Return for how many tokens a new cache of a sequence has room. It can grow."""
    return sequence.given + min(sequence.left, EXPECTED_ANSWER)
