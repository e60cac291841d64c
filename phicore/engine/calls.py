"""Calls of the device: they are started, and later their tokens are taken."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from phicore.engine import logprobs
from phicore.engine.drafts import PADDING, accepted
from phicore.engine.places import Places, put
from phicore.engine.rows import Call, Rows
from phicore.engine.runner import Runner
from phicore.engine.sequence import Output, Sequence
from phicore.engine.speculation import Checks, Speculation
from phicore.errors import FAULTS, PhicoreError

NOT_FINITE = (
    "the model's scores are not finite numbers: the file is damaged, or its numbers are too large "
    "for this backend"
)
_NO_TOKEN = (
    "no token can be chosen: the logits processors forbid all, or scores are not finite numbers"
)


class Calls:
    """The decode calls of rows. Each waits in `Rows.pending` until its tokens are taken."""

    def __init__(self, runner: Runner, places: Places, speculation: Speculation) -> None:
        self._runner = runner
        self._places = places
        self._speculation = speculation
        self._taken_s = 0.0  # when the last tokens were taken, by `time.perf_counter`

    # ---- starting --------------------------------------------------------------------------

    def start(self, rows: Rows) -> None:
        """Start a decode call for the next tokens, unless there are none for this cache."""
        running = [sequence for sequence in rows.live if sequence.left]
        if not running or any(map(self.has_outgrown_factors, running)):
            return
        counts = [self._runner.ops.capabilities.steps, *(s.left for s in running)]
        for sequence in running:
            factors = self._runner.tables.left(sequence.computed, sequence.is_long)
            counts += [] if factors is None else [factors]
        count = 1 if rows.needs_tokens else min(counts)
        started_s, compile_s = time.perf_counter(), running[0].timings.compile_s
        tokens = self._runner.decode(rows, count)
        is_running = [s if s is not None and s.left else None for s in rows.sequences]
        started = None if running[0].timings.compile_s > compile_s else started_s
        rows.pending.append(Call(tokens, count, tuple(is_running), rows.logprobs, None, started))
        for sequence in running:
            sequence.computed += count
            sequence.sampled += count

    def start_checking(self, rows: Rows, checks: Checks) -> None:
        """Start a call that checks drafts. The host must have read all tokens."""
        timings = rows.live[0].timings
        started_s, compile_s = time.perf_counter(), timings.compile_s
        inputs = checks.inputs
        tokens = self._runner.verify(rows, inputs, checks.ahead)
        started = None if timings.compile_s > compile_s else started_s
        sequences = tuple(rows.sequences)
        call = Call(tokens, inputs.shape[1], sequences, rows.logprobs, inputs, started)
        rows.pending.append(call)

    def look_ahead(self, rows: Rows) -> None:
        """Start the part of the next call that needs no processor, unless there is none."""
        running = [sequence for sequence in rows.live if sequence.left]
        if running and not any(map(self.has_outgrown_factors, running)):
            self._runner.look_ahead(rows)

    def has_outgrown_factors(self, sequence: Sequence) -> bool:
        """Return whether the next token lies beyond LongRoPE's original context.

        The last token of an answer is never run, so it may lie beyond.
        """
        left = self._runner.tables.left(sequence.computed, sequence.is_long)
        return sequence.left > 0 and left is not None and left < 1

    # ---- taking ----------------------------------------------------------------------------

    def take(self, rows: Rows) -> list[Output]:
        """Wait for the tokens of the oldest call, and return what they are for each sequence."""
        call = rows.pending[0]
        to_numpy = self._runner.ops.to_numpy
        values = _checked_tokens(to_numpy(call.tokens), call).tolist()
        found = {name: to_numpy(array) for name, array in call.logprobs.items()}
        rows.pending.popleft()  # only now: Ctrl-C may end the wait, and others need the tokens
        self._measure(rows, call)
        outputs = []
        for row, sequence in enumerate(call.sequences):
            # A sequence that has ended meanwhile has left its row.
            if sequence is not None and rows.sequences[row] is sequence:
                try:
                    known = {name: array[row] for name, array in found.items()}
                    if call.inputs is None:
                        outputs.append(self._took(rows, sequence, values[row], known))
                    else:
                        inputs = call.inputs[row].tolist()
                        outputs.append(self._checked(rows, sequence, values[row], inputs, known))
                except FAULTS as error:  # a processor may raise anything
                    outputs += self._places.failed([sequence], error)
        return outputs

    def _measure(self, rows: Rows, call: Call) -> None:
        """Tell the scheduler the time of a step of the only batch, while no prompt is read."""
        now_s, before_s = time.perf_counter(), self._taken_s
        self._taken_s = now_s
        if call.started_s is None or self._runner.ops.capabilities.steps > 1:
            return
        places, has_drafter = self._places, self._speculation.drafter is not None
        if len(places.batches) == 1 and not places.reading and has_drafter:
            size = 1 if call.inputs is None else call.count
            took_s = now_s - max(call.started_s, before_s)
            is_drawn = rows.draw is not None
            places.scheduler.step_took(len(rows.sequences), size, took_s, is_drawn=is_drawn)

    def _checked(
        self,
        rows: Rows,
        sequence: Sequence,
        values: list[int],
        inputs: list[int],
        known: Mapping[str, np.ndarray],
    ) -> Output:
        """Add to an answer those tokens of a step that are its text.

        Args:
            values: The T tokens that were sampled.
            inputs: The T tokens that were run.
            known: The log probabilities of the tokens, if a sequence asks for them.
        """
        count = accepted(values, inputs)
        sequence.computed += count
        sequence.sampled += count
        output = self._took(rows, sequence, values[:count], known)
        drafted = sum(token != PADDING for token in inputs[1:])
        right = min(count - 1, len(output.tokens))
        sequence.timings.drafts += drafted > 0
        sequence.timings.drafted_tokens += drafted
        sequence.timings.accepted_tokens += right
        assert self._speculation.drafter is not None
        self._speculation.drafter.checked(sequence, drafted, right)
        return output

    def _took(
        self,
        rows: Rows,
        sequence: Sequence,
        values: list[int],
        known: Mapping[str, np.ndarray],
    ) -> Output:
        """Add tokens to the answer of a sequence, up to its end.

        Args:
            known: The log probabilities of the tokens, if a sequence asks for them.
        """
        ends = sequence.request.ends
        count = next((i for i, value in enumerate(values, 1) if value in ends), len(values))
        found = values[:count]
        if min(found) < 0:
            raise PhicoreError(_NO_TOKEN if sequence.processors else NOT_FINITE)
        if max(found) >= (size := self._runner.config.vocab_size):
            raise PhicoreError(f"the backend chose token {max(found)}: expected 0 to {size - 1}")
        rows.tell(sequence, found)
        for value in found:
            sequence.timings.count_token()
            if len(sequence.answer) == sequence.given - len(sequence.request.prompt_ids):
                self._places.report(sequence, sequence.given)
            sequence.answer.append(value)
        if found[-1] in ends:
            self._places.end(sequence, "stop")
        if sequence.finish_reason is None and len(sequence.answer) == sequence.limit:
            self._places.end(sequence, sequence.at_limit)
        wanted = sequence.request.logprobs
        likely = [] if wanted is None else logprobs.of_tokens(found, known, wanted)
        return put(Output(sequence, tuple(found), sequence.finish_reason, logprobs=tuple(likely)))


def _checked_tokens(tokens: np.ndarray, call: Call) -> np.ndarray:
    """Return the wanted tokens of a call, (B, `count`), after a check of what a backend gives.

    Raises:
        PhicoreError: If it gives another shape or dtype.
    """
    shape, rows = np.shape(tokens), len(call.sequences)
    is_right = len(shape) == 2 and shape[0] == rows and shape[1] >= call.count
    if not is_right or tokens.dtype != np.int32:
        raise PhicoreError(
            f"the backend gave tokens {getattr(tokens, 'dtype', '')} {list(shape)}, "
            f"expected int32 [{rows}, {call.count}]"
        )
    return tokens[:, : call.count]
