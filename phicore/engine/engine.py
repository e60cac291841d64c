"""The engine: it takes requests in, and runs them one step after the other.

The scheduler of many sequences is yet to come: each sequence has slots of its own, and a step runs
every sequence it is asked for as a batch of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Tokens
from typing import Self

import numpy as np

from phicore.backend import Array, Backend, Params
from phicore.engine.chunks import (
    LOGITS_CHUNKS,
    capacity_for,
    capacity_of_window,
    chunk_at,
    chunks,
)
from phicore.engine.compiled import Compiled
from phicore.engine.request import Request
from phicore.engine.rope_tables import RopeTables
from phicore.engine.sequence import Output, Sequence
from phicore.engine.slots import Cache, Slots
from phicore.engine.steps import Steps
from phicore.engine.timings import Timings
from phicore.errors import ArgumentError, ContextError, PhicoreError
from phicore.gguf.reader import GGUFFile
from phicore.network import sampler
from phicore.network.architectures import Architecture, architecture_of
from phicore.network.config import Phi3Config
from phicore.network.rope import RopeFactors
from phicore.network.tensors import vocab_size
from phicore.network.weights import load_params
from phicore.progress import Progress, silent

EXPECTED_ANSWER = 512
"""A new cache has slots for this many tokens of an answer, if so many are asked for."""


class Engine:
    """Runs one model on one backend.

    Attributes:
        ops: The backend.
        config: The hyperparameters of the network that one device computes.
        params: The weights.
        vocab_size: V.
        context: How many tokens a prompt and its answer may have together.
        progress: Called while steps are compiled and prompts are read.
        steps: The compiled steps.
        tables: The rotary tables.
    """

    def __init__(
        self,
        ops: Backend,
        config: Phi3Config,
        params: Params,
        *,
        vocab_size: int,
        context: int,
        progress: Progress,
        rope_factors: RopeFactors | None = None,
    ) -> None:
        self.ops = ops
        self.vocab_size = vocab_size
        self.config = config
        self.params = params
        self.context = context
        self.progress = progress
        self.steps = Compiled(ops, Steps(ops, config), params, progress)
        self.tables = RopeTables(ops, config, rope_factors)
        self._sequences: list[Sequence] = []
        self._slots: dict[int, Slots] = {}
        self._numbers = itertools.count()

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
    ) -> Self:
        """Load a file's model.

        Args:
            architecture: What reads the file; None takes the built-in one of its name.
            config: What the architecture read from the file's metadata; None reads it.
            context: How many tokens at most; None takes as many as the model was made for.
        Raises:
            GGUFError: If the file is not understood.
            BackendError: If the backend cannot hold such a model.
        """
        architecture = architecture or architecture_of(file.metadata)
        config = config or architecture.config(file.metadata)
        share = config.share(ops.options.devices)  # what can be wrong, before a long load
        ops.new_cache(1, 1, 1, config.head_dim)  # a cache type may not hold such heads
        rope_factors = architecture.rope_factors(config, file)
        return cls(
            ops,
            share,
            load_params(ops, architecture, config, file, progress),
            vocab_size=vocab_size(file),
            context=config.max_position_embeddings if context is None else context,
            progress=progress,
            rope_factors=rope_factors,
        )

    # ---- sequences -------------------------------------------------------------------------

    def add(self, request: Request) -> Sequence:
        """Take a request in. It takes no memory of the device until it is stepped.

        Raises:
            ArgumentError: If the prompt has a token outside of the vocabulary.
            ContextError: If the prompt leaves no room for an answer.
        """
        self._check_fits(request.prompt_ids, 1)
        room = self.context - len(request.prompt_ids)
        limit, at_limit = request.max_tokens, "length"
        if limit > room:
            limit, at_limit = room, "context"
        is_long = self.tables.is_long(len(request.prompt_ids) + limit)
        sequence = Sequence(request, limit, at_limit, is_long)
        self._sequences.append(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """End a sequence and free its slots. One that has ended already stays as it is."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
        if sequence.slot is not None:
            del self._slots[sequence.slot]
            sequence.slot = None

    def step(self, sequences: Iterable[Sequence] | None = None) -> list[Output]:
        """Do a step of some sequences, or of all: read a chunk of the prompt, or decode.

        Returns:
            What each sequence gained; a sequence that finishes has ended.
        Raises:
            PhicoreError: If no token can be chosen for a sequence.
        """
        outputs = []
        for sequence in list(self._sequences if sequences is None else sequences):
            if sequence.slot is None:
                self._place(sequence)
            if sequence.is_prompt_read:
                output = self._decode(sequence)
            else:
                output = self._read_chunk(sequence)
            outputs.append(output)
            if output.finish_reason is not None:
                self.abort(sequence)
        return outputs

    def generate(self, request: Request) -> Iterator[int]:
        """Add a request and step it until it finishes: the tokens of its answer."""
        sequence = self.add(request)
        try:
            while True:
                for output in self.step([sequence]):
                    yield from output.tokens
                    if output.finish_reason is not None:
                        return
        finally:
            self.abort(sequence)

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

    # ---- one sequence ----------------------------------------------------------------------

    def _place(self, sequence: Sequence) -> None:
        """Give a sequence that waited its slots."""
        request = sequence.request
        positions = len(request.prompt_ids) + min(sequence.limit, EXPECTED_ANSWER)
        sequence.timings.start(len(request.prompt_ids))
        self.progress("prompt", 0, len(request.prompt_ids))
        slots = Slots.of(
            self.new_cache(positions, sequence.is_long),
            [request],
            [sequence.limit],
            vocab_size=self.vocab_size,
            context=self.context,
        )
        sequence.slot = next(self._numbers)
        self._slots[sequence.slot] = slots

    def _slots_of(self, sequence: Sequence) -> Slots:
        assert sequence.slot is not None, "a sequence is placed before it is computed"
        return self._slots[sequence.slot]

    def _read_chunk(self, sequence: Sequence) -> Output:
        """Read a chunk of the prompt. Every chunk samples a token; only the last one's counts."""
        slots, prompt = self._slots_of(sequence), sequence.request.prompt_ids
        sizes = self.ops.capabilities.prompt_chunks
        chunk = chunk_at(prompt, sequence.computed, sizes, is_padded=self.is_padded)
        before, state = slots.token, (slots.penalty, slots.states)
        self._run(sequence, chunk.tokens, chunk.positions, chunk.last)
        if before is not None:  # then the chunk before is in the cache
            self.ops.to_numpy(before)
            self.progress("prompt", sequence.computed, len(prompt))
        sequence.computed = chunk.end
        if sequence.is_prompt_read:
            sequence.sampled = 1
            slots.pending.append((slots.token, 1))
        else:
            slots.penalty, slots.states = state
        return Output(sequence)

    def _decode(self, sequence: Sequence) -> Output:
        """Read the tokens of a call; where the library works in the background, one call ahead."""
        slots = self._slots_of(sequence)
        if not slots.pending:
            self._start_decode(sequence)
        # The first token does not wait until the decode step is compiled.
        needs_tokens = any(p.needs_tokens for p in sequence.request.processors)
        if self.ops.capabilities.asynchronous and sequence.answer and not needs_tokens:
            self._start_decode(sequence)
        tokens, count = slots.pending.pop(0)
        found: list[int] = []
        finish_reason = None
        for value in self.ops.to_numpy(tokens)[0, :count].tolist():
            if value < 0:
                processors = sequence.request.processors
                raise PhicoreError(_NO_TOKEN if processors else _NOT_FINITE)
            slots.tell(value)
            sequence.timings.count_token()
            if not sequence.answer:
                prompt = len(sequence.request.prompt_ids)
                self.progress("prompt", prompt, prompt)
            sequence.answer.append(value)
            found.append(value)
            if value in sequence.request.ends:
                finish_reason = "stop"
                break
        if finish_reason is None and len(sequence.answer) == sequence.limit:
            finish_reason = sequence.at_limit
        return Output(sequence, tuple(found), finish_reason)

    def _start_decode(self, sequence: Sequence) -> None:
        """Start a call that runs the last token and samples the next ones, if any are wanted."""
        if not sequence.left:
            return
        slots, steps = self._slots_of(sequence), self.ops.capabilities.steps
        needs_tokens = any(p.needs_tokens for p in sequence.request.processors)
        count = 1 if needs_tokens else min(sequence.left, steps)
        if steps == 1:
            self._run(sequence, slots.token, slots.position, slots.only)
            slots.pending.append((slots.token, 1))
        else:
            self._run_steps(sequence, count)
        sequence.computed += count
        sequence.sampled += count

    def _run(
        self,
        sequence: Sequence,
        tokens: Array | np.ndarray,
        positions: Array | np.ndarray,
        last: Array | np.ndarray,
    ) -> None:
        """Run tokens (1, T) of a sequence from its first that is not computed, and sample one."""
        slots, asarray = self._slots_of(sequence), self.ops.asarray
        self._make_room(slots.cache, sequence.computed, tokens.shape[1])
        draw = slots.draw and {**slots.draw, "uniforms": self._uniforms(sequence)}
        if isinstance(tokens, np.ndarray):
            tokens, positions, last = asarray(tokens), asarray(positions), asarray(last)
        end = sequence.computed + tokens.shape[1]
        (
            slots.cache.layers,
            slots.token,
            slots.position,
            recent,
            slots.states,
        ) = self.steps.run(
            self.steps.step(slots.kinds),
            slots.cache,
            self.tables.until(end, sequence.is_long),
            (tokens, positions, last, slots.penalty, draw, slots.states),
            sequence.timings,
        )
        slots.penalty = {**slots.penalty, "recent": recent}

    def _run_steps(self, sequence: Sequence, count: int) -> None:
        """Run the last token of a sequence and sample `count` tokens in one call."""
        slots = self._slots_of(sequence)
        self._make_room(slots.cache, sequence.computed, count)
        steps = self.ops.capabilities.steps
        draw = slots.draw and {**slots.draw, "uniforms": self._uniforms(sequence, count, steps)}
        wanted = self.ops.asarray(np.array([count], np.int32))
        (
            slots.cache.layers,
            slots.token,
            slots.position,
            recent,
            slots.states,
            tokens,
        ) = self.steps.run(
            self.steps.steps(slots.kinds),
            slots.cache,
            self.tables.until(sequence.computed + count, sequence.is_long),
            (slots.token, slots.position, slots.penalty, draw, slots.states, wanted, slots.ends),
            sequence.timings,
        )
        slots.penalty = {**slots.penalty, "recent": recent}
        slots.pending.append((tokens, count))

    def _uniforms(self, sequence: Sequence, count: int = 1, room: int | None = None) -> Array:
        """Random numbers for the next tokens: (1, V), or (room, 1, V) of which `count` are used."""
        seed, size = sequence.request.seed, self.vocab_size
        assert seed is not None, "filled in by Request"
        numbers = np.zeros((room or 1, size), np.float32)
        for i in range(count):
            numbers[i] = sampler.uniforms(seed, sequence.sampled + i, size)
        return self.ops.asarray(numbers if room is None else numbers[:, None])

    # ---- logits ----------------------------------------------------------------------------

    def logits(self, tokens: Tokens[int]) -> np.ndarray:
        """Compute the scores of the next token after each token: (T, V) float32.

        Raises:
            ArgumentError: If there is no token, or one outside of the vocabulary.
            ContextError: If there are more tokens than the context holds.
            PhicoreError: If a score is not a finite number.
        """
        if not len(tokens):
            raise ArgumentError("expected at least one token, got none", parameter="prompt")
        self._check_fits(tokens, 0)
        is_long = self.tables.is_long(len(tokens))
        cache = self.new_cache(len(tokens), is_long)
        rows = None
        for chunk in chunks(tokens, LOGITS_CHUNKS, is_padded=self.is_padded):
            self._make_room(cache, chunk.start, chunk.size)
            cache.layers, logits = self.steps.run(
                self.steps.score(),
                cache,
                self.tables.until(chunk.start + chunk.size, is_long),
                (self.ops.asarray(chunk.tokens), self.ops.asarray(chunk.positions)),
                Timings(),
            )
            found = self.ops.to_numpy(logits)[0, : chunk.end - chunk.start]
            if rows is None:
                rows = np.empty((len(tokens), found.shape[1]), np.float32)
            rows[chunk.start : chunk.end] = found
        assert rows is not None
        if not np.isfinite(rows).all():
            raise PhicoreError(_NOT_FINITE)
        return rows

    # ---- caches ----------------------------------------------------------------------------

    @property
    def is_padded(self) -> bool:
        """Whether chunks have few sizes, since each is compiled."""
        ops = self.ops.capabilities
        return ops.compiles and ops.compiled_tokens is None

    def new_cache(self, positions: int, is_long: bool = False) -> Cache:
        """An empty cache of one row, with slots for this many tokens."""
        c, capacity = self.config, self._capacity_for(positions)
        layers = [
            self.ops.new_cache(1, c.num_key_value_heads, capacity, c.head_dim)
            for _ in range(c.num_hidden_layers)
        ]
        return Cache(self.ops, layers, capacity, np.array([self.tables.start(is_long)], np.int32))

    def _capacity_for(self, positions: int) -> int:
        """Slots for this many tokens, and no more than the window needs."""
        window, capacity = self.config.sliding_window, capacity_for(positions)
        if window is None:
            return capacity
        return min(capacity, capacity_of_window(window, self.ops.capabilities.prompt_chunks[-1]))

    def _make_room(self, cache: Cache, start: int, count: int) -> None:
        """See that `count` tokens from position `start` on have slots."""
        starts = np.array([start], np.int32)
        if not cache.lacks(starts, count):
            return
        cache.grow(self._capacity_for(start + count - int(cache.first.min())))
        if cache.lacks(starts, count):
            assert self.config.sliding_window is not None, "a cache without a window grows"
            counts = cache.unseen(starts, count, self.config.sliding_window)
            cache.freed(self.steps.shift(cache.layers, counts), counts)


_NOT_FINITE = (
    "the model's scores are not finite numbers: the file is damaged, or its numbers are too large "
    "for this backend"
)
_NO_TOKEN = (
    "no token can be chosen: the logits processors forbid all, or scores are not finite numbers"
)
