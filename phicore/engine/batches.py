"""Batches: sequences that share each decode call come, go on together, and leave."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

import numpy as np

from phicore.engine.calls import Calls
from phicore.engine.places import Places
from phicore.engine.rows import Rows
from phicore.engine.runner import Runner
from phicore.engine.sequence import Output, Sequence, SequenceError
from phicore.engine.speculation import Speculation
from phicore.errors import PhicoreError
from phicore.network.processors import Kinds


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
        ready = (rows.kinds for rows in self._places.ready)
        for kinds in list(dict.fromkeys([*self._places.batches, *ready])):
            outputs += self._advance(kinds)
        return outputs

    def _advance(self, kinds: Kinds) -> list[Output]:
        """Arrange a batch, start its next call, and take the tokens of the oldest call.

        On an asynchronous backend, the next call is started before the last call's tokens are
        read, unless sequences come or go.
        """
        outputs: list[Output] = []
        places, calls = self._places, self._calls
        rows = places.batches.get(kinds)
        concerned = [*(rows.live if rows is not None else []), *self._ready_of(kinds)]
        try:
            if rows is None or self._must_rearrange(rows):
                while rows is not None and rows.pending:
                    outputs += calls.take(rows)
                self._rearrange(kinds)
                if kinds not in places.batches:
                    return outputs
            rows = places.batches[kinds]
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
        except Exception as error:  # noqa: BLE001 - no memory left, for example
            outputs += places.failed(_going_on(concerned), error)
        except BaseException:  # Ctrl-C; the batch may be half arranged
            places.failed(_going_on(concerned), PhicoreError("interrupted"))
            raise
        return outputs

    def _ready_of(self, kinds: Kinds) -> list[Sequence]:
        ready = self._places.ready
        return [sequence for rows in ready for sequence in rows.live if rows.kinds == kinds]

    def _must_rearrange(self, rows: Rows) -> bool:
        """Return whether sequences come or go, or fewer rows would do."""
        if any(ready.kinds == rows.kinds for ready in self._places.ready):
            return True
        if any(self._calls.has_outgrown_factors(sequence) for sequence in rows.live):
            return True
        size, rows_wanted = len(rows.sequences), self._places.scheduler.rows_wanted
        if rows_wanted(size, len(rows.live), 10**9) < size:
            rows.idle += 1
        return rows_wanted(size, len(rows.live), rows.idle) != size

    def _rearrange(self, kinds: Kinds) -> None:
        """Let sequences into a batch and out of it. The host must have read all of its tokens."""
        places = self._places
        rows = places.batches.pop(kinds, None)
        for sequence in rows.live if rows is not None else []:
            if self._calls.has_outgrown_factors(sequence):
                assert rows is not None
                self._read_again(rows, sequence)
        new = [ready for ready in places.ready if ready.kinds == kinds]
        places.ready = [ready for ready in places.ready if ready.kinds != kinds]
        if rows is None or not rows.live:
            if not new:
                return
            rows = new.pop(0)
        needed = len(rows.live) + len(new)
        size = places.scheduler.rows_wanted(len(rows.sequences), needed, rows.idle)
        if size != len(rows.sequences):
            indices = [i for i, sequence in enumerate(rows.sequences) if sequence is not None]
            sequences = [*rows.live, *[None] * (size - len(indices))]
            self._runner.rearrange(rows, indices, size)
            rows.sequences = sequences
        for ready in new:
            index = rows.sequences.index(None)
            self._runner.insert(rows, index, ready)
            rows.sequences[index] = ready.sequences[0]
        places.batches[kinds] = places.memory.rows(rows.cache, rows.sequences, rows.states)

    def _read_again(self, rows: Rows, sequence: Sequence) -> None:
        """Let a sequence read all its tokens anew, rotated by LongRoPE's long factors.

        The reference does the same: its keys were rotated by the short factors, so the cache is of
        no more use. The states of the sampler and of logits processors stay as they are.

        Source: `prepare_inputs_for_generation` of transformers (modeling_phi3.py).
        """
        row = np.array([rows.sequences.index(sequence)], np.int32)
        states = self._runner.steps.take_states(rows.states, row) if rows.states else []
        sequence.timings.start_again()
        sequence.read_again(is_long=True)
        rows.end(sequence)
        self._places.again.append((sequence, states))


def _going_on(sequences: Tokens[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.finish_reason is None]
