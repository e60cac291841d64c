"""The engine, which accepts requests and runs them step by step, many at a time.

A sequence waits, is read (its prompt runs in chunks, in a row of its own), is ready, and then runs
as a row of a batch until it ends. Rows share each decode step. The text of a sequence does not
depend on the others: a row sees its own slots, and its random numbers follow from its own seed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np

from phicore.backend import Backend
from phicore.engine import logprobs, sessions
from phicore.engine.cache import Cache
from phicore.engine.chunks import MIN_CAPACITY
from phicore.engine.drafts import PADDING, Drafter, Plan, accepted, inputs_of
from phicore.engine.prefixes import SHORTEST, Prefix, Prefixes
from phicore.engine.request import Request, check_logprobs
from phicore.engine.rows import Call, Rows, first_states
from phicore.engine.runner import Runner
from phicore.engine.scheduler import SIZES, STEP_SIZES, Scheduler
from phicore.engine.sequence import Output, Sequence
from phicore.engine.steps import States
from phicore.errors import ArgumentError, ContextError, PhicoreError, SessionError
from phicore.gguf.reader import GGUFFile
from phicore.network.architectures import Architecture, architecture_of
from phicore.network.config import Phi3Config
from phicore.network.processors import Kinds, LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.network.weights import load_params, read_config
from phicore.progress import AGAIN, Progress, silent
from phicore.text.logprobs import TokenLogprobs

log = logging.getLogger(__name__)

EXPECTED_ANSWER = 512
"""A new cache has slots for the prompt and up to this many tokens of the answer. It can grow."""


class Engine:
    """Runs the requests of one model on one backend. Several threads may use it.

    Attributes:
        runner: The runner, which runs tokens on the device.
        scheduler: The queue of the sequences that wait.
        context: The largest number of tokens that a prompt and its answer may have together.
        progress: Called while prompts are read.
        prefixes: What ended sequences have computed.
        drafter: Guesses the next tokens; None guesses none.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        context: int,
        progress: Progress = silent,
        scheduler: Scheduler | None = None,
        prefix_bytes: int = 0,
        kv_bytes: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """Make an engine.

        Args:
            scheduler: The queue; None makes one with the defaults.
            prefix_bytes: The largest number of bytes of the prefix cache.
            kv_bytes: The largest number of bytes of all caches of keys and values together; None
                sets no limit. A sequence waits until it fits beside the others. A single sequence
                is never kept from growing, unless `fit_context` is called.
            drafter: Guesses tokens, which are then checked several at a time. None guesses none.
                The answers are the same in any case.
        """
        self._slot_bytes = runner.slot_bytes + (drafter.slot_bytes if drafter is not None else 0)
        if kv_bytes is not None:  # the drafter gets its share of the memory
            kv_bytes = kv_bytes * runner.slot_bytes // self._slot_bytes
        self._kv_bytes = kv_bytes
        self.drafter = drafter
        self.runner = runner
        self.prefixes = Prefixes(prefix_bytes, runner.config.sliding_window)
        self.context = context
        self.progress = progress
        self.scheduler = scheduler or Scheduler()
        self._lock = threading.Lock()
        self._aborted: deque[Sequence] = deque()
        self._again: deque[tuple[Sequence, States]] = deque()
        self._reading: list[Rows] = []
        self._ready: list[Rows] = []
        self._batches: dict[Kinds, Rows] = {}
        self._taken_s = 0.0  # when the last tokens were taken, by `time.perf_counter`

    @classmethod
    def load(
        cls,
        ops: Backend,
        file: GGUFFile,
        architecture: Architecture | None = None,
        config: Phi3Config | None = None,
        *,
        context: int | None = None,
        progress: Progress = silent,
        scheduler: Scheduler | None = None,
        prefix_bytes: int = 0,
        kv_bytes: int | None = None,
        drafter: Drafter | None = None,
    ) -> Self:
        """Load the model of a file.

        Args:
            architecture: The file's architecture. None takes the built-in one that the file names.
            config: The result of `read_config` for the file. None calls it.
            context: The largest number of tokens. None takes the context that the model was made
                for.
            scheduler, prefix_bytes, kv_bytes, drafter: Arguments of `Engine`.
        Raises:
            GGUFError: If the file is damaged or not supported.
            BackendError: If the backend cannot hold the model.
        """
        architecture = architecture or architecture_of(file.metadata)
        config = config or read_config(file, architecture)
        # Raise the errors that are possible here before a long load.
        share = config.share(ops.options.devices)
        ops.new_cache(1, 1, 1, config.head_dim)  # not every cache type supports every head size
        factors = architecture.rope_factors(config, file)
        params = load_params(ops, architecture, config, file, progress)
        return cls(
            Runner(ops, share, params, factors, progress),
            context=config.max_position_embeddings if context is None else context,
            progress=progress,
            scheduler=scheduler,
            prefix_bytes=prefix_bytes,
            kv_bytes=kv_bytes,
            drafter=drafter,
        )

    def fit_context(self) -> None:
        """Reduce the context to what fits into `kv_bytes`.

        Raises:
            ArgumentError: If no text fits.
        """
        if self._kv_bytes is None:
            return
        most = self.runner.positions_in(self._kv_bytes)
        if most == 0:
            least = MIN_CAPACITY * self._slot_bytes
            raise ArgumentError(
                parameter="kv_memory",
                expected=f"{least} bytes or more for this model",
                got=self._kv_bytes * self._slot_bytes // self.runner.slot_bytes,
            )
        self.context = self.context if most is None else min(self.context, most)

    @property
    def vocab_size(self) -> int:
        """Return V, the number of tokens that the embedding has."""
        return self.runner.config.vocab_size

    # ---- requests --------------------------------------------------------------------------

    def add(self, request: Request) -> Sequence:
        """Add a request. It takes no memory on the device until its first step.

        Raises:
            ArgumentError: If the prompt has a token outside of the vocabulary, or the request asks
                for rotary factors that the model does not have.
            ContextError: If the prompt leaves no room for an answer.
            BusyError: If too many requests wait already.
        """
        self._check_fits(request.prompt_ids, 1)
        room = self.context - len(request.prompt_ids)
        limit, at_limit = request.max_tokens, "length"
        if limit == -1 or limit > room:
            limit, at_limit = room, "context"
        tables = self.runner.tables
        if request.rope_factors != "auto" and not tables.has_two_parts:
            raise ArgumentError(
                "this model has one set of rotary factors; leave the option out",
                parameter="rope_factors",
            )
        is_long = request.rope_factors == "long" or tables.is_long(len(request.prompt_ids))
        sequence = Sequence(request, limit, at_limit, is_long)
        with self._lock:
            self.scheduler.add(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """End a sequence and free its slots. Nothing happens if the sequence has ended already.

        This never waits for a step, since Python may call it at any time, for example while it
        frees objects.
        """
        if sequence.finish_reason is None:
            self._aborted.append(sequence)
            self._end_aborted_if_free()

    def _end_aborted_if_free(self) -> None:
        while self._aborted and self._lock.acquire(blocking=False):
            try:
                self._end_aborted()
            finally:
                self._lock.release()

    def step(self) -> list[Output]:
        """Run one step: a decode call of each batch, then a chunk of a prompt.

        A sequence that finishes or fails is ended. Errors do not leave this method: they are the
        output of the sequences that they concern.

        Returns:
            The outputs of the sequences that went on. Each is also added to the sequence's own
            outputs, so that several callers can each wait for their sequence.
        """
        with self._lock:
            self._end_aborted()
            outputs = []
            for kinds in list(dict.fromkeys([*self._batches, *(r.kinds for r in self._ready)])):
                outputs += self._advance(kinds)
            outputs += self._read()
        self._end_aborted_if_free()
        return outputs

    def outputs(self, sequence: Sequence) -> Generator[Output]:
        """Run steps, and yield the outputs of a sequence until it ends.

        If the iterator is closed early, the sequence is ended.

        Raises:
            Exception: The error that has ended the sequence.
        """
        try:
            while True:
                while sequence.outputs:
                    output = sequence.outputs.popleft()
                    if output.error is not None:
                        raise output.error
                    yield output
                    if output.finish_reason is not None:
                        return
                if sequence.finish_reason is None:
                    self.step()
                    continue
                with self._lock:  # another thread may be about to add the last output
                    if not sequence.outputs:
                        return
        finally:
            self.abort(sequence)

    def generate(self, request: Request) -> Iterator[int]:
        """Add a request, run it until it finishes, and yield the tokens of its answer."""
        for output in self.outputs(self.add(request)):
            yield from output.tokens

    def warm_up(
        self,
        samplings: Tokens[Sampling],
        *,
        has_logprobs: bool = False,
        processors: Tokens[LogitsProcessor] = (),
    ) -> None:
        """Compile the steps that sequences with these sampling parameters need, for short texts.

        Afterwards nothing is compiled when sequences come and go, until a text is longer than the
        smallest cache.

        Args:
            has_logprobs: Whether some sequences ask for log probabilities. Their steps are compiled
                beside the others.
            processors: Logits processors that sequences have, one at a time. The steps with each of
                them are compiled beside the others.
        """
        requests = [Request([0], sampling, max_tokens=2) for sampling in samplings]
        requests += [
            *(replace(request, logprobs=0) for request in requests if has_logprobs),
            *(replace(request, processors=[p]) for p in processors for request in requests),
        ]
        for request in requests:
            for size in self.runner.ops.capabilities.prompt_chunks:
                if size < self.context:
                    list(self.generate(replace(request, prompt_ids=[0] * size, max_tokens=1)))
        sizes = [size for size in SIZES if size <= self.scheduler.max_sequences]
        one = self.runner.new_cache(1)
        for size in sizes:
            cache = self.runner.copy(one, [0] * size, np.ones(size))
            for other in sizes:
                self.runner.copy(cache, [0] * other, np.ones(other))
            cache.layers = self.runner.steps.insert(cache.layers, one.layers, 0, 1)
            for request in requests:
                sequence = Sequence(request, 2, "length", False)
                states = first_states(self.runner.ops, sequence, self.vocab_size)
                if states:
                    states = self.runner.steps.take_states(states, np.zeros(size, np.int32))
                self.runner.decode(self._rows(cache, [sequence] * size, states), 1)
                for count in self._step_sizes(size, [sequence]):
                    rows = self._rows(cache, [sequence] * size, states)
                    self.runner.verify(rows, inputs_of(rows.sequences, {}, count))
        if self.drafter is not None and self.runner.ops.capabilities.steps == 1:
            checked = [size for size in sizes if self.scheduler.step_sizes(size)]
            self.drafter.warm_up(checked, samplings)

    def _check_fits(self, prompt: Tokens[int], answer: int) -> None:
        for token in prompt:
            if not 0 <= token < self.vocab_size:
                raise ArgumentError(f"token id {token}: expected 0 to {self.vocab_size - 1}")
        if len(prompt) + answer > self.context:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.context}, "
                "the answer included; shorten the prompt or raise the context",
                expected=f"{self.context - answer} tokens or fewer",
                got=len(prompt),
            )

    # ---- sessions --------------------------------------------------------------------------

    def save_session(self, path: Path, tokens: Tokens[int], model: str) -> int:
        """Save what is known of a sequence's first tokens, for another process.

        Args:
            path: The file, which is replaced at once when it is complete.
            tokens: The tokens of the sequence.
            model: A text that only this model has.
        Returns:
            The number of tokens that were saved, 0 if nothing is known; there is then no file.
        Raises:
            SessionError: If the backend's arrays cannot be saved, or the file cannot be written.
        """
        with self._lock:  # nobody may go on with this cache meanwhile
            known = self.prefixes.longest(tokens)
            if known is None:
                return 0
            sessions.save(path, known, self.runner, model)
            return len(known.tokens)

    def load_session(self, path: Path, model: str) -> Tokens[int]:
        """Load a session into the prefix cache, and return its tokens.

        Raises:
            SessionError: If the file cannot be read, is damaged, or does not fit.
        """
        known = sessions.load(path, self.runner, model)
        with self._lock:
            self.prefixes.add(known)
            if known not in self.prefixes:
                raise SessionError(
                    f"{path}: {known.cache.bytes} bytes, more than the prefix cache may have"
                )
        return list(map(int, known.tokens))

    # ---- who runs --------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Return whether no sequence waits or runs. Then only the prefix cache has memory."""
        return not (
            self.scheduler.waiting or self._again or self._reading or self._ready or self._batches
        )

    @property
    def kv_usage(self) -> tuple[int, int, int | None]:
        """Return the bytes of keys and values of running sequences, those of the prefix cache, and
        the largest number of both together; None if there is no limit.

        Only the thread that runs the steps may ask.
        """
        running = sum(rows.cache.bytes for rows in self._all_rows)
        return running, self.prefixes.bytes, self._kv_bytes

    @property
    def _all_rows(self) -> list[Rows]:
        """Return the rows of all sequences that have some."""
        return [*self._batches.values(), *self._ready, *self._reading]

    @property
    def _decoding(self) -> int:
        """Return the number of sequences whose answers wait while a prompt is read."""
        return len(self._ready) + sum(len(rows.live) for rows in self._batches.values())

    def _end_aborted(self) -> None:
        while self._aborted:
            sequence = self._aborted.popleft()
            if sequence.finish_reason is None:
                self._end(sequence, "abort")

    def _end(self, sequence: Sequence, finish_reason: str) -> None:
        """End a sequence, wherever it is."""
        sequence.finish_reason = finish_reason
        if sequence in self.scheduler.waiting:
            self.scheduler.waiting.remove(sequence)
        self._again = deque(pair for pair in self._again if pair[0] is not sequence)
        for rows in [*self._ready, *self._reading]:
            if sequence in rows.sequences:
                self._keep(rows, sequence)
        self._ready = [rows for rows in self._ready if sequence not in rows.sequences]
        self._reading = [rows for rows in self._reading if sequence not in rows.sequences]
        for kinds, rows in list(self._batches.items()):
            if sequence in rows.sequences:
                self._keep(rows, sequence)
                rows.end(sequence)
                if not rows.live:
                    del self._batches[kinds]

    def _keep(self, rows: Rows, sequence: Sequence) -> None:
        """Keep what an ended sequence has computed for others that begin the same way."""
        if sequence.finish_reason == "error" or not self.prefixes.most_bytes:
            return
        index, cache = rows.sequences.index(sequence), rows.cache
        # The last token may not have been run. A sequence whose last tokens were not read yet may
        # have used its last slots again.
        first = int(cache.first[index])
        full = first + cache.capacity - self.runner.ops.capabilities.steps
        tokens = sequence.tokens[:-1][: min(sequence.computed, full)]
        if len(tokens) < SHORTEST or cache.bytes > len(rows.sequences) * self.prefixes.most_bytes:
            return
        try:
            if len(rows.sequences) > 1:
                room = self.runner.capacity_for(len(tokens) - first + EXPECTED_ANSWER)
                capacity, end = min(room, cache.capacity), np.array([len(tokens)])
                cache = self.runner.copy(cache, [index], end, capacity)
        except Exception as error:  # noqa: BLE001 - no memory left, for example
            log.warning("a prefix is not kept: %s", error)
            return
        self.prefixes.add(Prefix(np.array(tokens, np.int32), sequence.is_long, cache))
        if self._kv_bytes is not None:
            self.prefixes.shrink(max(self._kv_bytes - self._running_bytes(rows), 0))

    def _running_bytes(self, ended: Rows) -> int:
        """Return the bytes of all caches of sequences that run, without a row that has ended."""
        is_alone = len(ended.sequences) == 1
        return sum(r.cache.bytes for r in self._all_rows if not (is_alone and r is ended))

    def _failed(self, sequences: Tokens[Sequence], error: Exception) -> list[Output]:
        """End sequences because of an error."""
        for sequence in sequences:
            self._end(sequence, "error")
        return [self._put(Output(sequence, (), "error", error)) for sequence in sequences]

    @staticmethod
    def _put(output: Output) -> Output:
        """Add an output to those of its sequence, at once: an interrupt must not lose it."""
        output.sequence.outputs.append(output)
        return output

    # ---- reading ---------------------------------------------------------------------------

    def _read(self) -> list[Output]:
        """Read a chunk of one prompt, or the first token after the last chunk."""
        outputs = self._place_waiting()
        if not self._reading:
            return outputs
        reading = [rows.live[0] for rows in self._reading]
        index = self.scheduler.next_chunk(reading)
        rows, sequence = self._reading[index], reading[index]
        try:
            if not rows.pending:
                self._read_chunk(rows, sequence)
                return [*outputs, self._put(Output(sequence))]
            outputs += self._take_tokens(rows)
        except Exception as error:  # noqa: BLE001 - a processor may raise anything
            return [*outputs, *self._failed([sequence], error)]
        if sequence.finish_reason is None:
            self._reading.remove(rows)
            self._ready.append(rows)
        return outputs

    def _place_waiting(self) -> list[Output]:
        """Give rows to the sequences that wait, as many as fit; return the outputs of failures."""
        outputs = []
        while self._again:
            sequence, states = self._again.popleft()
            outputs += self._place(sequence, AGAIN, states)
        while self.scheduler.waiting and self._has_memory_for(self.scheduler.waiting[0]):
            found = self.scheduler.next_to_read(self._decoding + len(self._reading))
            if found is None:
                break
            found.timings.start(len(found.request.prompt_ids))
            try:
                outputs += self._place(found, "prompt")
            except BaseException:  # Ctrl-C, which concerns others as little as possible
                self.scheduler.waiting.appendleft(found)
                raise
        return outputs

    def _place(self, sequence: Sequence, what: str, states: States | None = None) -> list[Output]:
        try:
            if states is None:
                states = first_states(self.runner.ops, sequence, self.vocab_size)
            rows = self._rows(self._cache_for(sequence), [sequence], states)
        except Exception as error:  # noqa: BLE001 - a processor may raise anything
            return self._failed([sequence], error)
        self.progress(what, sequence.computed, sequence.given)
        self._reading.append(rows)
        return []

    def _has_memory_for(self, sequence: Sequence) -> bool:
        """Return whether a sequence fits beside those that run, however long all become.

        All rows of a batch have the capacity of the longest. The prefix cache makes way, except for
        what the sequence itself begins with.
        """
        if self._kv_bytes is None:
            return True
        all_rows = self._all_rows
        others = [other for rows in all_rows for other in rows.live]
        if len(others) >= self.scheduler.max_sequences:
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
            self.scheduler.rows_wanted(1, len(lengths), 0),
            1 + sum(len(rows.sequences) for rows in all_rows),
        )
        room = self._kv_bytes - max(capacities) * count * self.runner.slot_bytes
        if room < copied and others:
            return False
        self.prefixes.shrink(max(room, 0) + taken)
        return True

    def _cache_for(self, sequence: Sequence) -> Cache:
        """Return a cache for a sequence: with the first tokens of its prompt, if these are known.

        Its capacity is for the given tokens and a part of the answer.
        """
        answer = min(sequence.left, EXPECTED_ANSWER)
        found = self.prefixes.find(sequence.tokens, is_long=sequence.is_long)
        if found is None:
            return self.runner.new_cache(sequence.given + answer, sequence.is_long)
        prefix, sequence.computed = found
        if not sequence.is_read_again:
            sequence.timings.cached_tokens = sequence.computed
        cache, end = prefix.cache, sequence.computed
        capacity = self.runner.capacity_for(sequence.given + answer - int(cache.first[0]))
        if end == len(prefix.tokens) and capacity <= cache.capacity:
            return cache
        return self.runner.copy(cache, [0], np.array([end]), capacity)

    def _rows(self, cache: Cache, sequences: Tokens[Sequence | None], states: States) -> Rows:
        return Rows.of(cache, sequences, states, context=self.context)

    def _read_chunk(self, rows: Rows, sequence: Sequence) -> None:
        """Read a chunk of the given tokens.

        Every chunk samples a token. Only the token that the last chunk samples is used. The chunk
        before is waited for, so that nobody waits long for an abort, and its time is measured.
        """
        others = self._decoding + len(self._reading) - 1
        most = self.scheduler.most_tokens(others)
        given = sequence.tokens[: sequence.given]
        chunk = self.runner.chunk_at(given, sequence.computed, most)
        if sequence.computed:
            self.runner.ops.to_numpy(rows.token)
            self._report(sequence, sequence.computed)
        state, compile_s = (rows.penalty, rows.states), sequence.timings.compile_s
        started = time.perf_counter()
        self.runner.read(rows, chunk)
        if others or self.scheduler.chunk_s is not None:
            self.runner.ops.to_numpy(rows.token)
            took_s = time.perf_counter() - started
            self.scheduler.measured(chunk.size, took_s - (sequence.timings.compile_s - compile_s))
        sequence.computed = chunk.end
        if sequence.is_read:
            sequence.sampled += 1
            rows.pending.append(Call(rows.token, 1, (sequence,), rows.logprobs))
        else:
            rows.penalty, rows.states = state

    def _report(self, sequence: Sequence, done: int) -> None:
        """Report how many of the given tokens are read."""
        self.progress(AGAIN if sequence.is_read_again else "prompt", done, sequence.given)

    # ---- decoding --------------------------------------------------------------------------

    def _advance(self, kinds: Kinds) -> list[Output]:
        """Arrange a batch, start its next call, and take the tokens of the oldest call.

        On an asynchronous backend, the next call is started before the last call's tokens are
        read, unless sequences come or go.
        """
        outputs: list[Output] = []
        rows = self._batches.get(kinds)
        concerned = [*(rows.live if rows is not None else []), *self._ready_of(kinds)]
        try:
            if rows is None or self._must_rearrange(rows):
                while rows is not None and rows.pending:
                    outputs += self._take_tokens(rows)
                self._rearrange(kinds)
                if kinds not in self._batches:
                    return outputs
            rows = self._batches[kinds]
            needs_tokens = any(sequence.needs_tokens for sequence in rows.live)
            is_early = self.runner.ops.capabilities.asynchronous and not needs_tokens
            size, plan = self._plan(rows)
            while rows.pending and (rows.pending[0].inputs is not None or size > 1):
                outputs += self._take_tokens(rows)  # what comes next depends on it
                size, plan = self._plan(rows)
            inputs = None if plan is None else self._drafted(rows, size, plan)
            if inputs is not None:
                self._start_checking(rows, inputs)
            elif not rows.pending:
                self._start(rows)
            if is_early and (outputs or inputs is not None):
                return outputs  # the call goes on meanwhile
            if is_early:
                self._start(rows)
            if rows.pending:
                outputs += self._take_tokens(rows)
        except Exception as error:  # noqa: BLE001 - no memory left, for example
            outputs += self._failed(_going_on(concerned), error)
        except BaseException:  # Ctrl-C; the batch may be half arranged
            self._failed(_going_on(concerned), PhicoreError("interrupted"))
            raise
        return outputs

    def _ready_of(self, kinds: Kinds) -> list[Sequence]:
        return [sequence for rows in self._ready for sequence in rows.live if rows.kinds == kinds]

    def _must_rearrange(self, rows: Rows) -> bool:
        """Return whether sequences come or go, or fewer rows would do."""
        if any(ready.kinds == rows.kinds for ready in self._ready):
            return True
        if any(self._has_outgrown_factors(sequence) for sequence in rows.live):
            return True
        size = len(rows.sequences)
        if self.scheduler.rows_wanted(size, len(rows.live), 10**9) < size:
            rows.idle += 1
        return self.scheduler.rows_wanted(size, len(rows.live), rows.idle) != size

    def _rearrange(self, kinds: Kinds) -> None:
        """Let sequences into a batch and out of it. The host must have read all of its tokens."""
        rows = self._batches.pop(kinds, None)
        for sequence in rows.live if rows is not None else []:
            if self._has_outgrown_factors(sequence):
                assert rows is not None
                self._read_again(rows, sequence)
        new = [ready for ready in self._ready if ready.kinds == kinds]
        self._ready = [ready for ready in self._ready if ready.kinds != kinds]
        if rows is None or not rows.live:
            if not new:
                return
            rows = new.pop(0)
        needed = len(rows.live) + len(new)
        size = self.scheduler.rows_wanted(len(rows.sequences), needed, rows.idle)
        if size != len(rows.sequences):
            indices = [i for i, sequence in enumerate(rows.sequences) if sequence is not None]
            sequences = [*rows.live, *[None] * (size - len(indices))]
            self.runner.rearrange(rows, indices, size)
            rows.sequences = sequences
        for ready in new:
            index = rows.sequences.index(None)
            self.runner.insert(rows, index, ready)
            rows.sequences[index] = ready.sequences[0]
        self._batches[kinds] = self._rows(rows.cache, rows.sequences, rows.states)

    def _has_outgrown_factors(self, sequence: Sequence) -> bool:
        """Return whether the next token lies beyond LongRoPE's original context.

        The last token of an answer is never run, so it may lie beyond.
        """
        left = self.runner.tables.left(sequence.computed, sequence.is_long)
        return sequence.left > 0 and left is not None and left < 1

    def _read_again(self, rows: Rows, sequence: Sequence) -> None:
        """Let a sequence read all its tokens anew, rotated by LongRoPE's long factors.

        The reference does the same: its keys were rotated by the short factors, so the cache is of
        no more use. The states of the sampler and of logits processors stay as they are.

        Source: `prepare_inputs_for_generation` of transformers (modeling_phi3.py).
        """
        row = np.array([rows.sequences.index(sequence)], np.int32)
        states = self.runner.steps.take_states(rows.states, row) if rows.states else []
        sequence.timings.start_again()
        sequence.read_again(is_long=True)
        rows.end(sequence)
        self._again.append((sequence, states))

    def _start(self, rows: Rows) -> None:
        """Start a decode call for the next tokens, unless there are none for this cache."""
        running = [sequence for sequence in rows.live if sequence.left]
        if not running or any(map(self._has_outgrown_factors, running)):
            return
        counts = [self.runner.ops.capabilities.steps, *(s.left for s in running)]
        for sequence in running:
            factors = self.runner.tables.left(sequence.computed, sequence.is_long)
            counts += [] if factors is None else [factors]
            counts += [1] if sequence.needs_tokens else []
        count = min(counts)
        started_s, compile_s = time.perf_counter(), running[0].timings.compile_s
        tokens = self.runner.decode(rows, count)
        is_running = [s if s is not None and s.left else None for s in rows.sequences]
        started = None if running[0].timings.compile_s > compile_s else started_s
        rows.pending.append(Call(tokens, count, tuple(is_running), rows.logprobs, None, started))
        for sequence in running:
            sequence.computed += count
            sequence.sampled += count

    def _step_sizes(self, rows: int, live: Tokens[Sequence]) -> tuple[int, ...]:
        """Return the numbers of tokens that a step which checks drafts may have.

        Calls of several steps, as on GPUs, and processors that need each token check none.
        """
        has_drafts = any(sequence.request.speculation for sequence in live)
        needs_tokens = any(sequence.needs_tokens for sequence in live)
        is_possible = self.drafter is not None and self.runner.ops.capabilities.steps == 1
        return (
            self.scheduler.step_sizes(rows)
            if is_possible and has_drafts and not needs_tokens
            else ()
        )

    def _plan(self, rows: Rows) -> tuple[int, Plan | None]:
        """Return how many tokens of each row the next step runs, and how they are drafted.

        While a call is under way, the result only says whether it pays to wait for that.

        Returns:
            1 and None if no draft pays.
        """
        live = rows.live
        sizes = self._step_sizes(len(rows.sequences), live)
        if self.drafter is None or not sizes:
            return 1, None
        most = min(sequence.left for sequence in live)
        for sequence in live:
            factors = self.runner.tables.left(sequence.computed, sequence.is_long)
            most = most if factors is None else min(most, factors)
        if most < sizes[0]:
            return 1, None
        asked = [sequence for sequence in live if sequence.request.speculation]
        plans = self.drafter.plans(asked, STEP_SIZES[-1] - 1)
        is_drawn = rows.draw is not None
        return self.scheduler.plan_wanted(len(rows.sequences), most, live, plans, is_drawn=is_drawn)

    @staticmethod
    def _drafted(rows: Rows, size: int, plan: Plan) -> np.ndarray | None:
        """Return the tokens of a step that checks drafts, (B, T) int32; None if there are none."""
        drafts = plan.make(size - 1)
        if not any(draft.tokens for draft in drafts.values()):
            return None
        return inputs_of(rows.sequences, drafts, size)

    def _start_checking(self, rows: Rows, inputs: np.ndarray) -> None:
        """Start a call that checks drafts. The host must have read all tokens."""
        timings = rows.live[0].timings
        started_s, compile_s = time.perf_counter(), timings.compile_s
        tokens = self.runner.verify(rows, inputs)
        started = None if timings.compile_s > compile_s else started_s
        sequences = tuple(rows.sequences)
        call = Call(tokens, inputs.shape[1], sequences, rows.logprobs, inputs, started)
        rows.pending.append(call)

    def _take_tokens(self, rows: Rows) -> list[Output]:
        """Wait for the tokens of the oldest call, and return what they are for each sequence."""
        call = rows.pending[0]
        to_numpy = self.runner.ops.to_numpy
        values = to_numpy(call.tokens)[:, : call.count].tolist()
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
                except Exception as error:  # noqa: BLE001 - a processor may raise anything
                    outputs += self._failed([sequence], error)
        return outputs

    def _measure(self, rows: Rows, call: Call) -> None:
        """Tell the scheduler the time of a step of the only batch, while no prompt is read."""
        now_s, before_s = time.perf_counter(), self._taken_s
        self._taken_s = now_s
        if call.started_s is None or self.runner.ops.capabilities.steps > 1:
            return
        if len(self._batches) == 1 and not self._reading and self.drafter is not None:
            size = 1 if call.inputs is None else call.count
            took_s = now_s - max(call.started_s, before_s)
            is_drawn = rows.draw is not None
            self.scheduler.step_took(len(rows.sequences), size, took_s, is_drawn=is_drawn)

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
        assert self.drafter is not None
        self.drafter.checked(sequence, drafted, right)
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
        found: list[int] = []
        for value in values:
            if value < 0:
                processors = sequence.processors
                raise PhicoreError(_NO_TOKEN if processors else _NOT_FINITE)
            rows.tell(sequence, value)
            sequence.timings.count_token()
            if len(sequence.answer) == sequence.given - len(sequence.request.prompt_ids):
                self._report(sequence, sequence.given)
            sequence.answer.append(value)
            found.append(value)
            if value in sequence.request.ends:
                self._end(sequence, "stop")
                break
        if sequence.finish_reason is None and len(sequence.answer) == sequence.limit:
            self._end(sequence, sequence.at_limit)
        wanted = sequence.request.logprobs
        likely = [] if wanted is None else logprobs.of_tokens(found, known, wanted)
        return self._put(
            Output(sequence, tuple(found), sequence.finish_reason, logprobs=tuple(likely))
        )

    # ---- scores ----------------------------------------------------------------------------

    def logits(self, tokens: Tokens[int]) -> np.ndarray:
        """Compute the scores of the next token after each token: (T, V) float32.

        Raises:
            ArgumentError: If there is no token, or a token is outside of the vocabulary.
            ContextError: If there are more tokens than the context holds.
            PhicoreError: If a score is not a finite number.
        """
        self._check_scored(tokens)
        scores = self.runner.scores(tokens)
        if not np.isfinite(scores).all():
            raise PhicoreError(_NOT_FINITE)
        return scores

    def score(self, tokens: Tokens[int], count: int = 0) -> list[TokenLogprobs | None]:
        """Compute the log probability of each token after the tokens before it.

        This takes less memory than `logits`: the scores of 64 tokens at a time.

        Args:
            count: The number of alternatives, 0 to 20, that each result has.
        Returns:
            One result for each token. The first is None, since nothing comes before it.
        Raises:
            ArgumentError: If there is no token, a token is outside of the vocabulary, or the count
                is not allowed.
            ContextError: If there are more tokens than the context holds.
            PhicoreError: If a log probability is not a finite number.
        """
        self._check_scored(tokens)
        check_logprobs(count)
        found = self.runner.logprobs(tokens)
        if not all(np.isfinite(found[name]).all() for name in ("chosen", "likeliest")):
            raise PhicoreError(_NOT_FINITE)
        return [None, *logprobs.of_tokens(tokens[1:], found, count)]

    def _check_scored(self, tokens: Tokens[int]) -> None:
        if not len(tokens):
            raise ArgumentError("expected at least one token, got none", parameter="prompt")
        self._check_fits(tokens, 0)


def _going_on(sequences: Tokens[Sequence]) -> list[Sequence]:
    return [sequence for sequence in sequences if sequence.finish_reason is None]


_NOT_FINITE = (
    "the model's scores are not finite numbers: the file is damaged, or its numbers are too large "
    "for this backend"
)
_NO_TOKEN = (
    "no token can be chosen: the logits processors forbid all, or scores are not finite numbers"
)
