"""Batches: sequences that share each decode call come, go on together, and leave."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

import numpy as np

from phicore.engine.calls import Calls
from phicore.engine.places import Places
from phicore.engine.rows import Rows
from phicore.engine.runner import Runner
from phicore.engine.sequence import Output, Sequence, SequenceError
from phicore.engine.sharing import hosts
from phicore.engine.speculation import Speculation
from phicore.engine.steps import States
from phicore.errors import FAULTS, PhicoreError
from phicore.network.processors import Kinds, LogitsProcessor, has_neutral, needs_tokens


class Batches:
    """Arranges the batches, and lets each go on."""

    def __init__(
        self, runner: Runner, places: Places, speculation: Speculation, calls: Calls
    ) -> None:
        self._runner = runner
        self._places = places
        self._speculation = speculation
        self._calls = calls

    def advance(self) -> list[Output]:
        """Let each batch go on by a call."""
        outputs: list[Output] = []
        for kinds, members in self._groups().items():
            outputs += self._advance(kinds, members)
        return outputs

    def _groups(self) -> dict[Kinds, list[Rows]]:
        """Return which rows are to share a batch, by the classes of its logits processors.

        A batch stays together, and sequences that are ready come to it.
        """
        places, groups = self._places, dict[Kinds, list[Rows]]()
        all_rows = [*places.batches, *places.ready]
        found = hosts((rows.kinds_needed for rows in all_rows), self._may_be_added)
        for rows in all_rows:
            groups.setdefault(found[rows.kinds_needed], []).append(rows)
        return groups

    def _may_be_added(self, kind: type[LogitsProcessor]) -> bool:
        """Return whether rows without a processor of a class may share a batch with others.

        Where a call runs several steps, they would lose that by a processor that needs each token.
        """
        is_slow = needs_tokens(kind) and self._runner.ops.capabilities.steps > 1
        return has_neutral(kind) and not is_slow

    def _advance(self, kinds: Kinds, members: list[Rows]) -> list[Output]:
        """Arrange a batch, start its next call, and take the tokens of the oldest call.

        On an asynchronous backend, the next call is started before the last call's tokens are
        read, unless sequences come or go.

        Args:
            kinds: The classes of logits processors with which the batch is computed.
            members: The batches and the rows that are ready which make the batch.
        """
        outputs: list[Output] = []
        places, calls = self._places, self._calls
        concerned = [sequence for rows in members for sequence in rows.live]
        try:
            rows = members[0]
            if self._must_rearrange(kinds, members):
                for member in members:
                    while member.pending:
                        outputs += calls.take(member)
                arranged = self._rearrange(kinds, members)
                if arranged is None:
                    return outputs
                rows = arranged
            is_asynchronous = self._runner.ops.capabilities.asynchronous
            is_early = is_asynchronous and not rows.needs_tokens
            wanted = self._speculation.wanted(rows, places.scheduler)
            while rows.pending and (rows.pending[0].inputs is not None or wanted is not None):
                outputs += calls.take(rows)  # what comes next depends on it
                wanted = self._speculation.wanted(rows, places.scheduler)
            checks = None
            if wanted is not None and rows.scores is None:
                checks = self._speculation.checks(rows, wanted)
            if checks is not None:
                calls.start_checking(rows, checks)
            elif not rows.pending:
                calls.start(rows)
                if is_asynchronous and rows.needs_tokens and wanted is None:
                    calls.look_ahead(rows)
            if is_early and (outputs or checks is not None):
                return outputs  # the call goes on meanwhile
            if is_early:
                calls.start(rows)
            if rows.pending:
                outputs += calls.take(rows)
        except SequenceError as fault:
            outputs += places.failed([fault.sequence], fault.error)
        except FAULTS as error:  # no memory left, for example
            outputs += places.failed(_going_on(concerned), error)
        except BaseException:  # Ctrl-C; the batch may be half arranged
            places.failed(_going_on(concerned), PhicoreError("interrupted"))
            raise
        return outputs

    def _must_rearrange(self, kinds: Kinds, members: list[Rows]) -> bool:
        """Return whether sequences come or go, or other rows would do."""
        rows = members[0]
        if len(members) > 1 or rows in self._places.ready or rows.kinds != kinds:
            return True
        if any(self._calls.has_outgrown_factors(sequence) for sequence in rows.live):
            return True
        size, rows_wanted = len(rows.sequences), self._places.scheduler.rows_wanted
        if rows_wanted(size, len(rows.live), 10**9) < size:
            rows.idle += 1
        return rows_wanted(size, len(rows.live), rows.idle) != size

    def _rearrange(self, kinds: Kinds, members: list[Rows]) -> Rows | None:
        """Let sequences into a batch and out of it. The host must have read all of its tokens.

        Returns:
            The batch; None if no sequence is left.
        """
        places, runner = self._places, self._runner
        places.batches = [rows for rows in places.batches if rows not in members]
        places.ready = [rows for rows in places.ready if rows not in members]
        for rows in members:
            for sequence in rows.live:
                if self._calls.has_outgrown_factors(sequence):
                    self._read_again(rows, sequence)
        members = [rows for rows in members if rows.live]
        if not members:
            return None
        for rows in members:
            rows.change_kinds(kinds, runner.config.vocab_size)
        rows = max(members, key=lambda rows: len(rows.sequences))
        new = [one for other in members if other is not rows for one in self._single_rows(other)]
        needed = len(rows.live) + len(new)
        size = places.scheduler.rows_wanted(len(rows.sequences), needed, rows.idle)
        if size != len(rows.sequences):
            indices = [i for i, sequence in enumerate(rows.sequences) if sequence is not None]
            sequences = [*rows.live, *[None] * (size - len(indices))]
            runner.rearrange(rows, indices, size)
            rows.sequences = sequences
        for one in new:
            index = rows.sequences.index(None)
            runner.insert(rows, index, one)
            rows.sequences[index] = one.sequences[0]
        arranged = places.memory.rows(rows.cache, rows.sequences, kinds, rows.states)
        places.batches.append(arranged)
        return arranged

    def _single_rows(self, rows: Rows) -> list[Rows]:
        """Return the rows of each sequence alone."""
        if len(rows.sequences) == 1:
            return [rows]
        found, ends = [], rows.positions(0)
        for index, sequence in enumerate(rows.sequences):
            if sequence is not None:
                cache = self._runner.copy(rows.cache, [index], ends[[index]])
                states = self._states_of(rows, index)
                found.append(self._places.memory.rows(cache, [sequence], rows.kinds, states))
        return found

    def _states_of(self, rows: Rows, index: int) -> States:
        row = np.array([index], np.int32)
        return self._runner.steps.take_states(rows.states, row) if rows.states else []

    def _read_again(self, rows: Rows, sequence: Sequence) -> None:
        """Let a sequence read all its tokens anew, rotated by LongRoPE's long factors.

        The reference does the same: its keys were rotated by the short factors, so the cache is of
        no more use. The states of the sampler and of logits processors stay as they are.

        Source: `prepare_inputs_for_generation` of transformers (modeling_phi3.py).
        """
        states = self._states_of(rows, rows.sequences.index(sequence))
        states = [states[number] for number, _ in rows.processors_of(sequence)]
        sequence.timings.start_again()
        sequence.read_again(is_long=True)
        rows.end(sequence)
        self._places.again.append((sequence, states))


def _going_on(sequences: Tokens[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.finish_reason is None]
