"""Prompts are read in chunks, one chunk a step."""

from __future__ import annotations

import time
from collections.abc import Sequence as Tokens

from phicore.engine.calls import Calls
from phicore.engine.places import Places, put
from phicore.engine.rows import Call, Rows
from phicore.engine.runner import Runner
from phicore.engine.sequence import Output, Sequence
from phicore.errors import FAULTS


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
        except FAULTS as error:  # a processor may raise anything
            return [*outputs, *places.failed([sequence], error)]
        if sequence.finish_reason is None:
            places.reading.remove(rows)
            places.ready.append(rows)
        return outputs

    def _foresee(self, rows: Rows, given: Tokens[int]) -> None:
        """Begin to compile what reads a prompt, in the order in which it is needed."""
        sizes = []
        while given:
            chunk = self._runner.chunk_at(given, 0)
            sizes.append(chunk.size)
            given = given[chunk.end :]
        self._runner.foresee_reading(rows, sizes)

    def _read_chunk(self, rows: Rows, sequence: Sequence) -> None:
        """Read a chunk of the given tokens; after the last chunk, a token is sampled.

        The chunk before is waited for, so that nobody waits long for an abort, and its time is
        measured.
        """
        self._places.memory.share(rows, self._places.all_rows)
        scheduler = self._places.scheduler
        others = self._places.decoding + len(self._places.reading) - 1
        most = self._places.team.agreed(scheduler.most_tokens(others))  # it depends on times
        given = sequence.tokens[: sequence.given]
        chunk = self._runner.chunk_at(given, sequence.computed, most)
        is_last = chunk.end == sequence.given
        if not others and not sequence.computed:
            self._foresee(rows, given)
            if not self._runner.weights.are_loaded:
                self._runner.foresee_decoding(rows)
        if sequence.computed:
            self._wait(rows)
            self._places.report(sequence, sequence.computed)
        compile_s = sequence.timings.compile_s
        started = time.perf_counter()
        self._runner.read(rows, chunk, is_last=is_last)
        if not others and is_last:
            self._runner.foresee_decoding(rows)  # while the device reads
        if others or scheduler.chunk_s is not None:
            self._wait(rows)
            took_s = time.perf_counter() - started
            if chunk.size > 1:  # one token alone takes far longer than one among others
                scheduler.measured(chunk.size, took_s - (sequence.timings.compile_s - compile_s))
        sequence.computed = chunk.end
        if sequence.is_read:
            sequence.sampled += 1
            rows.pending.append(Call(rows.token, 1, (sequence,), rows.logprobs))

    def _wait(self, rows: Rows) -> None:
        """Wait until the device has read the last chunk."""
        self._runner.ops.to_numpy(rows.token if rows.scores is None else rows.scores)
