"""The arrays on the device with which sequences are computed, one sequence in each row."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from phicore.backend import Array, Backend, philox
from phicore.backend.shapes import power_of_two
from phicore.engine.cache import Cache
from phicore.engine.sequence import Sequence as EngineSequence
from phicore.engine.steps import ENDED, Logprobs, States
from phicore.errors import PhicoreError
from phicore.network import sampler
from phicore.network.processors import Kinds, LogitsProcessor, check_same
from phicore.network.sampling import Sampling

MIN_RECENT = 64
"""The smallest number of recent tokens that a row stores, so that few sizes are compiled."""
ENDS = 8
"""The number of end tokens of a row is padded to a multiple of this."""
NOBODY = Sampling(temperature=0.0)
"""How a row without a sequence is sampled."""


@dataclass(frozen=True)
class Call:
    """A decode call whose tokens the host has not read yet.

    Attributes:
        tokens: The sampled tokens, (B, N) int32.
        count: The number of tokens that were requested, at most N.
        sequences: The sequences of the rows when the call was started.
        logprobs: The log probabilities of the tokens, arrays (B, N, ...); empty if no sequence asks
            for them.
        inputs: The tokens that were run, (B, N) int32 on the host, if the call checks drafts. How
            many of its tokens are the text is then not known before they are read.
        started_s: When the call was started, by `time.perf_counter`; None if its time tells
            nothing, since something was compiled.
    """

    tokens: Array
    count: int
    sequences: tuple[EngineSequence | None, ...]
    logprobs: Logprobs = field(default_factory=dict)
    inputs: np.ndarray | None = None
    started_s: float | None = None


@dataclass(eq=False)
class Rows:
    """The cache of B sequences, and the arrays for their next step.

    A row whose sequence has ended is None. It is computed with the others, without effect, until
    the rows are arranged anew.

    Attributes:
        sequences: The sequence of each row.
        states: The states of the rows' logits processors.
        penalty, draw: Arguments of `sampler.sample`, without `uniforms` or `step`.
        ends: The tokens that end each row, (B, any) int32, padded with -1.
        only: Zeros, (B,) int32: the index of the last token in a step of one token.
        token: The last token of each row, (B, 1) int32.
        logprobs: The log probabilities of the tokens of the last call; empty if no sequence asks
            for them.
        scores: The logits of what follows `token`, (B, V), if they were computed ahead.
        pending: The calls that the host has not read yet, the oldest first.
        idle: The number of steps since fewer rows would do.
    """

    cache: Cache
    sequences: list[EngineSequence | None]
    states: States
    penalty: dict[str, Array]
    draw: dict[str, Array] | None
    ends: Array
    only: Array
    token: Array
    logprobs: Logprobs = field(default_factory=dict)
    scores: Array | None = None
    pending: deque[Call] = field(default_factory=deque)
    idle: int = 0

    @classmethod
    def of(
        cls,
        cache: Cache,
        sequences: Sequence[EngineSequence | None],
        states: States,
        *,
        context: int,
    ) -> Rows:
        """Make the rows of sequences, which must have processors of the same classes.

        Args:
            cache: The cache, with B rows.
            sequences: The B sequences. The host must have read all of their tokens.
            states: The states of their logits processors.
            context: The largest number of tokens of a sequence.
        """
        ops = cache.ops
        draw = sampler.inputs([NOBODY if s is None else s.request.sampling for s in sequences])
        if draw and ops.capabilities.random_on_device:
            draw["key"] = philox.keys([0 if s is None else s.request.seed or 0 for s in sequences])
        last = [[0 if s is None else s.tokens[-1]] for s in sequences]
        return cls(
            cache,
            list(sequences),
            states,
            _penalty(ops, sequences, context),
            draw and {name: ops.asarray(array) for name, array in draw.items()},
            _ends(ops, sequences),
            ops.asarray(np.zeros(len(sequences), np.int32)),
            ops.asarray(np.array(last, np.int32)),
        )

    @property
    def live(self) -> list[EngineSequence]:
        """Return the sequences that go on."""
        return [sequence for sequence in self.sequences if sequence is not None]

    @property
    def kinds(self) -> Kinds:
        """Return the classes of the rows' logits processors."""
        live = self.live
        return live[0].kinds if live else ()

    @property
    def needs_tokens(self) -> bool:
        """Return whether a processor needs each token before the next one is sampled."""
        return any(sequence.needs_tokens for sequence in self.live)

    @property
    def has_logprobs(self) -> bool:
        """Return whether a sequence asks for log probabilities."""
        return any(sequence.request.logprobs is not None for sequence in self.live)

    def positions(self, count: int) -> np.ndarray:
        """Return the position of the next token in each row, (B,) int32 on the host.

        A row without a sequence uses its first slots again and again. A sequence that has all of
        its tokens, but whose last ones the host has not read, uses slots that it has.

        Args:
            count: The number of tokens that come next.
        """
        positions = np.array(self.cache.first, np.int32)
        for row, sequence in enumerate(self.sequences):
            if sequence is not None and sequence.left:
                positions[row] = sequence.computed
            elif sequence is not None:
                last = int(self.cache.first[row]) + self.cache.capacity - count
                positions[row] = min(sequence.computed, last)
        return positions

    def end(self, sequence: EngineSequence) -> None:
        """Leave a sequence's row without a sequence."""
        self.sequences[self.sequences.index(sequence)] = None

    def tell(self, sequence: EngineSequence, token: int) -> None:
        """Give the token that the next step begins with to the processors that need it."""
        ops, row = self.cache.ops, self.sequences.index(sequence)
        for number, processor in enumerate(sequence.processors):
            if processor.needs_tokens:
                old = self.states[number]
                new = _arrays(ops, processor, [processor.update(token)])
                if len(self.sequences) > 1:
                    new = {name: _with_row(ops, old[name], row, x) for name, x in new.items()}
                new = {**old, **new}
                check_same(f"{type(processor).__name__}.update", old, new)
                self.states[number] = new


def _with_row(ops: Backend, array: Array, row: int, new: Array) -> Array:
    """Replace a row of an array (B, ...) by `new` (1, ...)."""
    is_row = np.arange(array.shape[0]) == row
    shape = (-1, *(1 for _ in array.shape[1:]))
    return ops.xp.where(ops.asarray(is_row.reshape(shape)), new, array)


def first_states(ops: Backend, sequence: EngineSequence, vocab_size: int) -> States:
    """Return the states of a sequence's logits processors before its first token."""
    prompt = sequence.request.prompt_ids
    return [
        _arrays(ops, processor, [processor.start(prompt, vocab_size)])
        for processor in sequence.processors
    ]


def _arrays(
    ops: Backend, processor: LogitsProcessor, rows: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Array]:
    """Copy the states of rows to the device.

    Raises:
        PhicoreError: If an array has numbers of 64 bits, which not every library has.
    """
    arrays = {}
    for name in rows[0]:
        values = np.stack([row[name] for row in rows])
        if values.dtype.itemsize > 4:
            raise PhicoreError(
                f"{type(processor).__name__}: {name!r} of its state is {values.dtype}, "
                "expected numbers of 32 bits or fewer"
            )
        arrays[name] = ops.asarray(values)
    return arrays


def _penalty(
    ops: Backend, sequences: Sequence[EngineSequence | None], context: int
) -> dict[str, Array]:
    counts, factors = [], []
    for sequence in sequences:
        sampling = NOBODY if sequence is None else sequence.request.sampling
        last_n = sampling.repeat_last_n if sampling.has_penalty else 0
        if sequence is not None and (last_n < 0 or last_n > context):
            last_n = len(sequence.request.prompt_ids) + sequence.limit
        counts.append(last_n)
        factors.append(sampling.repeat_penalty)
    size = max(MIN_RECENT, power_of_two(max(counts)))
    recent = np.full((len(sequences), size), -1, np.int32)
    for row, sequence in zip(recent, sequences, strict=True):
        known = () if sequence is None else sequence.tokens[-size:]
        row[size - len(known) :] = known
    return {
        "recent": ops.asarray(recent),
        "last_n": ops.asarray(np.array(counts, np.int32)),
        "repeat_penalty": ops.asarray(np.array(factors, np.float32)),
    }


def _ends(ops: Backend, sequences: Sequence[EngineSequence | None]) -> Array:
    all_ends = [{ENDED} if s is None else s.request.ends for s in sequences]
    room = -(-max(1, *map(len, all_ends)) // ENDS) * ENDS
    ends = np.full((len(sequences), room), -1, np.int32)
    for row, found in zip(ends, all_ends, strict=True):
        row[: len(found)] = sorted(found)
    return ops.asarray(ends)
