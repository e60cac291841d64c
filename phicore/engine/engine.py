"""The engine, which accepts requests and runs them step by step.

There is no batching of sequences yet. Each sequence has slots of its own, and a step runs each
sequence as a batch of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Tokens
from typing import Self

import numpy as np

from phicore.backend import Backend
from phicore.engine.request import Request
from phicore.engine.runner import Runner
from phicore.engine.sequence import Output, Sequence
from phicore.engine.slots import Cache, Slots
from phicore.errors import ArgumentError, ContextError, PhicoreError
from phicore.gguf.reader import GGUFFile
from phicore.network.architectures import Architecture, architecture_of
from phicore.network.config import Phi3Config
from phicore.network.weights import load_params, read_config
from phicore.progress import AGAIN, Progress, silent

EXPECTED_ANSWER = 512
"""A new cache has slots for the prompt and up to this many tokens of the answer. It can grow."""


class Engine:
    """Runs the requests of one model on one backend.

    Attributes:
        runner: The runner, which runs tokens on the device.
        context: The largest number of tokens that a prompt and its answer may have together.
        progress: Called while prompts are read.
    """

    def __init__(self, runner: Runner, *, context: int, progress: Progress = silent) -> None:
        self.runner = runner
        self.context = context
        self.progress = progress
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
        """Load the model of a file.

        Args:
            architecture: The file's architecture. None takes the built-in one that the file names.
            config: The result of `read_config` for the file. None calls it.
            context: The largest number of tokens. None takes the context that the model was made
                for.
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
        )

    @property
    def vocab_size(self) -> int:
        """Return V, the number of tokens that the embedding has."""
        return self.runner.config.vocab_size

    # ---- sequences -------------------------------------------------------------------------

    def add(self, request: Request) -> Sequence:
        """Add a request. It takes no memory on the device until its first step.

        Raises:
            ArgumentError: If the prompt has a token outside of the vocabulary, or the request asks
                for rotary factors that the model does not have.
            ContextError: If the prompt leaves no room for an answer.
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
        self._sequences.append(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> None:
        """End a sequence and free its slots. Nothing happens if the sequence has ended already."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
        if sequence.slot is not None:
            del self._slots[sequence.slot]
            sequence.slot = None

    def step(self, sequences: Iterable[Sequence] | None = None) -> list[Output]:
        """Run one step of each of the given sequences; None means all sequences.

        A step reads a chunk of the prompt or, after the prompt, decodes. A sequence that finishes
        is ended.

        Returns:
            The output of the step for each sequence.
        Raises:
            PhicoreError: If no token can be chosen for a sequence.
        """
        outputs = []
        for sequence in list(self._sequences if sequences is None else sequences):
            if sequence.slot is None:
                self._place(sequence)
            if self._has_outgrown_factors(sequence):
                self._read_again(sequence)
            output = self._decode(sequence) if sequence.is_read else self._read_chunk(sequence)
            outputs.append(output)
            if output.finish_reason is not None:
                self.abort(sequence)
        return outputs

    def generate(self, request: Request) -> Iterator[int]:
        """Add a request, run it until it finishes, and yield the tokens of its answer."""
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
        """Give slots to a sequence that has none yet."""
        request = sequence.request
        sequence.timings.start(len(request.prompt_ids))
        self.progress("prompt", 0, len(request.prompt_ids))
        slots = Slots.of(
            self._empty_cache(sequence),
            [request],
            [sequence.limit],
            vocab_size=self.vocab_size,
            context=self.context,
        )
        sequence.slot = next(self._numbers)
        self._slots[sequence.slot] = slots

    def _empty_cache(self, sequence: Sequence) -> Cache:
        expected = min(sequence.left, EXPECTED_ANSWER)
        return self.runner.new_cache(sequence.given + expected, sequence.is_long)

    def _has_outgrown_factors(self, sequence: Sequence) -> bool:
        """Return whether the next token lies beyond LongRoPE's original context.

        Sampled tokens that the host has not read yet come first. The last token of an answer is
        never run, so it may lie beyond.
        """
        is_next = sequence.is_read and sequence.left and not self._slots_of(sequence).pending
        left = self.runner.tables.left(sequence.computed, sequence.is_long)
        return bool(is_next) and left is not None and left < 1

    def _read_again(self, sequence: Sequence) -> None:
        """Let a sequence read all its tokens anew, rotated by LongRoPE's long factors.

        The reference does the same: its keys were rotated by the short factors, so the cache is of
        no more use. The states of the sampler and of logits processors stay as they are.

        Source: `prepare_inputs_for_generation` of transformers (modeling_phi3.py).
        """
        sequence.timings.start_again()
        sequence.read_again(is_long=True)
        slots = self._slots_of(sequence)
        slots.cache.layers.clear()  # frees the memory before the new cache takes it
        slots.cache = self._empty_cache(sequence)
        self.progress(AGAIN, 0, sequence.given)

    def _slots_of(self, sequence: Sequence) -> Slots:
        assert sequence.slot is not None, "a sequence is placed before it is computed"
        return self._slots[sequence.slot]

    def _read_chunk(self, sequence: Sequence) -> Output:
        """Read a chunk of the given tokens.

        Every chunk samples a token. Only the token that the last chunk samples is used.
        """
        slots = self._slots_of(sequence)
        chunk = self.runner.chunk_at(sequence.tokens[: sequence.given], sequence.computed)
        before, state = slots.token, (slots.penalty, slots.states)
        self.runner.read(sequence, slots, chunk)
        if before is not None:  # once this token is computed, the previous chunk is in the cache
            self.runner.ops.to_numpy(before)
            if sequence.computed:
                self._tell(sequence, sequence.computed)
        sequence.computed = chunk.end
        if sequence.is_read:
            sequence.sampled += 1
            slots.pending.append((slots.token, 1))
        else:
            slots.penalty, slots.states = state
        return Output(sequence)

    def _decode(self, sequence: Sequence) -> Output:
        """Read the tokens of one decode call.

        On an asynchronous backend, the next call is started before this call's tokens are read.
        """
        slots = self._slots_of(sequence)
        if not slots.pending:
            self._start_decode(sequence)
        # The first token does not wait until the decode step is compiled.
        is_ahead = self.runner.ops.capabilities.asynchronous and not sequence.needs_tokens
        if is_ahead and sequence.answer:
            self._start_decode(sequence)
        tokens, count = slots.pending.pop(0)
        found: list[int] = []
        finish_reason = None
        for value in self.runner.ops.to_numpy(tokens)[0, :count].tolist():
            if value < 0:
                processors = sequence.request.processors
                raise PhicoreError(_NO_TOKEN if processors else _NOT_FINITE)
            slots.tell(value)
            sequence.timings.count_token()
            if len(sequence.answer) == sequence.given - len(sequence.request.prompt_ids):
                self._tell(sequence, sequence.given)
            sequence.answer.append(value)
            found.append(value)
            if value in sequence.request.ends:
                finish_reason = "stop"
                break
        if finish_reason is None and len(sequence.answer) == sequence.limit:
            finish_reason = sequence.at_limit
        return Output(sequence, tuple(found), finish_reason)

    def _tell(self, sequence: Sequence, done: int) -> None:
        """Report how many of the given tokens are read."""
        self.progress(AGAIN if sequence.is_read_again else "prompt", done, sequence.given)

    def _start_decode(self, sequence: Sequence) -> None:
        """Start a decode call for the next tokens, unless there are none for this cache."""
        most = self.runner.ops.capabilities.steps
        count = min(sequence.left, 1 if sequence.needs_tokens else most)
        factors = self.runner.tables.left(sequence.computed, sequence.is_long)
        if factors is not None:
            count = min(count, factors)
        if count < 1:
            return
        slots = self._slots_of(sequence)
        slots.pending.append((self.runner.decode(sequence, slots, count), count))
        sequence.computed += count
        sequence.sampled += count

    def logits(self, tokens: Tokens[int]) -> np.ndarray:
        """Compute the scores of the next token after each token: (T, V) float32.

        Raises:
            ArgumentError: If there is no token, or a token is outside of the vocabulary.
            ContextError: If there are more tokens than the context holds.
            PhicoreError: If a score is not a finite number.
        """
        if not len(tokens):
            raise ArgumentError("expected at least one token, got none", parameter="prompt")
        self._check_fits(tokens, 0)
        scores = self.runner.scores(tokens)
        if not np.isfinite(scores).all():
            raise PhicoreError(_NOT_FINITE)
        return scores


_NOT_FINITE = (
    "the model's scores are not finite numbers: the file is damaged, or its numbers are too large "
    "for this backend"
)
_NO_TOKEN = (
    "no token can be chosen: the logits processors forbid all, or scores are not finite numbers"
)
