"""Where each sequence is, from the queue to its end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens

from phicore.engine.memory import Memory
from phicore.engine.rows import Rows, first_states
from phicore.engine.scheduler import Scheduler
from phicore.engine.sequence import Output, Sequence
from phicore.engine.steps import States
from phicore.engine.team import ALONE, Team
from phicore.errors import FAULTS, as_error
from phicore.progress import AGAIN, Progress


class Places:
    """Where sequences are: they wait, are read in rows of their own, are ready, or in a batch.

    Attributes:
        memory: Says who has room, and gives the caches.
        scheduler: The queue of the sequences that wait.
        progress: Called while prompts are read.
        team: The engines that compute the same model.
        again: The sequences that wait to be read again, and the states of their processors.
        reading: The rows of sequences that are read, the oldest first.
        ready: The rows of sequences that are read, and in no batch yet.
        batches: The batches, each with other classes of logits processors.
    """

    def __init__(self, memory: Memory, scheduler: Scheduler, progress: Progress) -> None:
        self.memory = memory
        self.scheduler = scheduler
        self.progress = progress
        self.team: Team = ALONE
        self.again: deque[tuple[Sequence, States]] = deque()
        self.reading: list[Rows] = []
        self.ready: list[Rows] = []
        self.batches: list[Rows] = []

    @property
    def is_idle(self) -> bool:
        """Return whether no sequence waits or runs."""
        return not (self.scheduler.waiting or self.again or self.all_rows)

    @property
    def all_rows(self) -> list[Rows]:
        """Return the rows of all sequences that have some."""
        return [*self.batches, *self.ready, *self.reading]

    @property
    def decoding(self) -> int:
        """Return the number of sequences whose answers wait while a prompt is read."""
        return len(self.ready) + sum(len(rows.live) for rows in self.batches)

    # ---- beginning -------------------------------------------------------------------------

    def fill(self) -> list[Output]:
        """Give rows to the sequences that wait, as many as fit; return the outputs of failures."""
        outputs = []
        while self.again:
            sequence, states = self.again.popleft()
            outputs += self._place(sequence, AGAIN, states)
        waiting = self.scheduler.waiting
        while waiting and self.memory.has_room_for(waiting[0], self.all_rows, self.scheduler):
            found = self.scheduler.next_to_read(self.decoding + len(self.reading))
            if found is None:
                break
            found.timings.start(len(found.request.prompt_ids))
            try:
                outputs += self._place(found, "prompt")
            except BaseException:  # Ctrl-C, which concerns others as little as possible
                waiting.appendleft(found)
                raise
        return outputs

    def _place(self, sequence: Sequence, what: str, states: States | None = None) -> list[Output]:
        runner = self.memory.runner
        try:
            if states is None:
                states = first_states(runner.ops, sequence, runner.config.vocab_size)
            cache = self.memory.cache_for(sequence)
            rows = self.memory.rows(cache, [sequence], sequence.kinds, states)
        except FAULTS as error:  # a processor may raise anything
            return self.failed([sequence], error)
        self.progress(what, sequence.computed, sequence.given)
        self.reading.append(rows)
        return []

    def report(self, sequence: Sequence, done: int) -> None:
        """Report how many of the given tokens are read."""
        self.progress(AGAIN if sequence.is_read_again else "prompt", done, sequence.given)

    # ---- ending ----------------------------------------------------------------------------

    def end(self, sequence: Sequence, finish_reason: str) -> None:
        """End a sequence, wherever it is."""
        sequence.finish_reason = finish_reason
        if sequence in self.scheduler.waiting:
            self.scheduler.waiting.remove(sequence)
        self.again = deque(pair for pair in self.again if pair[0] is not sequence)
        for rows in [*self.ready, *self.reading]:
            if sequence in rows.sequences:
                self.memory.keep(rows, sequence, self.all_rows)
        self.ready = [rows for rows in self.ready if sequence not in rows.sequences]
        self.reading = [rows for rows in self.reading if sequence not in rows.sequences]
        for rows in self.batches:
            if sequence in rows.sequences:
                self.memory.keep(rows, sequence, self.all_rows)
                rows.end(sequence)
        self.batches = [rows for rows in self.batches if rows.live]

    def failed(self, sequences: Tokens[Sequence], fault: BaseException) -> list[Output]:
        """End sequences because of an error."""
        error = as_error(fault)
        for sequence in sequences:
            self.end(sequence, "error")
        return [put(Output(sequence, (), "error", error)) for sequence in sequences]


def put(output: Output) -> Output:
    """Add an output to those of its sequence, at once: an interrupt must not lose it."""
    output.sequence.outputs.append(output)
    return output
