"""Prompts are read in chunks, one chunk a step."""

from __future__ import annotations

import time
from collections.abc import Sequence as Tokens

from phicore.engine.calls import Calls
from phicore.engine.places import Places, put
from phicore.engine.rows import Call, Rows
from phicore.engine.runner import Runner
from phicore.engine.sequence import Output, Sequence


class Prompts:
    """Reads the prompts of the sequences that have rows of their own."""

    def __init__(self, runner: Runner, places: Places, calls: Calls) -> None:
        self._runner = runner
        self._places = places
        self._calls = calls

    def read(self) -> list[Output]:
        """Read a chunk of one prompt, or the first token after the last chunk."""
        places = self._places
        outputs = places.fill()
        if not places.reading:
            return outputs
        reading = [rows.live[0] for rows in places.reading]
        index = places.scheduler.next_chunk(reading)
        rows, sequence = places.reading[index], reading[index]
        try:
            if not rows.pending:
                self._read_chunk(rows, sequence)
                return [*outputs, put(Output(sequence))]
            outputs += self._calls.take(rows)
        except Exception as error:  # noqa: BLE001 - a processor may raise anything
            return [*outputs, *places.failed([sequence], error)]
        if sequence.finish_reason is None:
            places.reading.remove(rows)
            places.ready.append(rows)
        return outputs

    def _foresee(self, rows: Rows, rest: Tokens[int]) -> None:
        """Begin to compile the steps for the rest of a prompt."""
        sizes: dict[int, None] = {}
        while rest:
            chunk = self._runner.chunk_at(rest, 0)
            sizes[chunk.size] = None
            rest = rest[chunk.end :]
        self._runner.foresee(rows, sizes)

    def _read_chunk(self, rows: Rows, sequence: Sequence) -> None:
        """Read a chunk of the given tokens.

        Every chunk samples a token. Only the token that the last chunk samples is used. The chunk
        before is waited for, so that nobody waits long for an abort, and its time is measured.
        """
        scheduler, ops = self._places.scheduler, self._runner.ops
        others = self._places.decoding + len(self._places.reading) - 1
        most = self._places.team.agreed(scheduler.most_tokens(others))  # it depends on times
        given = sequence.tokens[: sequence.given]
        chunk = self._runner.chunk_at(given, sequence.computed, most)
        if not others and not sequence.computed:
            self._foresee(rows, given[chunk.end :])
        if sequence.computed:
            ops.to_numpy(rows.token)
            self._places.report(sequence, sequence.computed)
        state, compile_s = (rows.penalty, rows.states), sequence.timings.compile_s
        started = time.perf_counter()
        self._runner.read(rows, chunk)
        if not others and chunk.end == sequence.given and ops.capabilities.steps == 1:
            self._runner.foresee(rows, [1])  # while the device reads, the step that decodes
        if others or scheduler.chunk_s is not None:
            ops.to_numpy(rows.token)
            took_s = time.perf_counter() - started
            scheduler.measured(chunk.size, took_s - (sequence.timings.compile_s - compile_s))
        sequence.computed = chunk.end
        if sequence.is_read:
            sequence.sampled += 1
            rows.pending.append(Call(rows.token, 1, (sequence,), rows.logprobs))
        else:
            rows.penalty, rows.states = state
