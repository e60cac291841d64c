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
from phicore.network.processors import Kinds, LogitsProcessor, check_same, needs_tokens
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


@dataclass(frozen=True)
class Ahead:
    """What logits processors tell on the host of the states after each token of drafts.

    Attributes:
        states: The arrays after each of T - 1 tokens, (B, ...), for the processors that need each
            token on the host.
        is_told: Which rows of each array are told, bool (B, ...) with axes of 1. The others follow
            from the device.
    """

    states: list[States]
    is_told: list[States]


@dataclass(eq=False)
class Rows:
    """The cache of B sequences, and the arrays for their next step.

    A row whose sequence has ended is None. It is computed with the others, without effect, until
    the rows are arranged anew.

    Attributes:
        sequences: The sequence of each row.
        kinds: The classes of logits processors with which all rows are computed. A row may have
            fewer processors; the states of the others are then neutral.
        states: The states of these processors.
        penalty, draw: Arguments of `sampler.sample`, without `uniforms` or `step`.
        ends: The tokens that end each row, (B, any) int32, padded with -1.
        only: Zeros, (B,) int32: the index of the last token in a step of one token.
        token: The last token of each row, (B, 1) int32.
        logprobs: The log probabilities of the tokens of the last call; empty if no sequence asks
            for them.
        scores: The logits of what follows `token`, (B, V), if they were computed ahead.
        pending: The calls that the host has not read yet, the oldest first.
        idle: The number of steps since fewer rows would do.
        blanks: Zeros on the host like one row of `states`, for processors that need each token
            there; None as long as nobody has asked for them.
    """

    cache: Cache
    sequences: list[EngineSequence | None]
    kinds: Kinds
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
    blanks: list[dict[str, np.ndarray]] | None = None

    @classmethod
    def of(
        cls,
        cache: Cache,
        sequences: Sequence[EngineSequence | None],
        kinds: Kinds,
        states: States,
        *,
        context: int,
    ) -> Rows:
        """Make the rows of sequences.

        Args:
            cache: The cache, with B rows.
            sequences: The B sequences. The host must have read all of their tokens.
            kinds: The classes of logits processors with which they are computed.
            states: The states of these processors.
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
            kinds,
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
    def kinds_needed(self) -> Kinds:
        """Return the classes that some of the sequences have."""
        needed = {kind for sequence in self.live for kind in sequence.kinds}
        return tuple(kind for kind in self.kinds if kind in needed)

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

    def change_kinds(self, kinds: Kinds, vocab_size: int) -> None:
        """Compute the rows with other classes of logits processors: more of them, or fewer.

        The states of those that are added are neutral.
        """
        if kinds == self.kinds:
            return
        states = []
        for kind in kinds:
            if kind in self.kinds:
                states.append(self.states[self.kinds.index(kind)])
            else:
                neutral = kind.neutral(vocab_size)
                assert neutral is not None, "only such classes are added"
                states.append(_arrays(self.cache.ops, kind, [neutral] * len(self.sequences)))
        self.kinds, self.states, self.blanks = kinds, states, None

    def processors_of(self, sequence: EngineSequence) -> list[tuple[int, LogitsProcessor]]:
        """Return a sequence's logits processors, each with the index of its state."""
        if sequence.kinds == self.kinds:
            return list(enumerate(sequence.processors))
        return [(self.kinds.index(type(p)), p) for p in sequence.processors]

    def ahead_of(self, sequence: EngineSequence, draft: Sequence[int]) -> list[States]:
        """Return what a sequence's processors tell ahead of a draft: the states after each token.

        The result ends before the first token that a processor forbids.

        Returns:
            A list of states on the host, without the axis B. They have the arrays that the
            processors which need each token compute.
        """
        blanks = self._blanks()
        told: list[Sequence[Mapping[str, np.ndarray]]] = [[{}] * len(draft) for _ in blanks]
        for number, processor in self.processors_of(sequence):
            if processor.needs_tokens:
                told[number] = found = processor.ahead(draft)
                blank = blanks[number]
                for new in found:
                    old = {name: blank[name] for name in blank.keys() & new.keys()}
                    check_same(f"{type(processor).__name__}.ahead", old, new)
        count = min(map(len, told), default=len(draft))
        return [[found[i] for found in told] for i in range(count)]

    def ahead(self, told: Mapping[EngineSequence, list[States]], count: int) -> Ahead:
        """Return what is told ahead for a step of `count` tokens, on the device.

        Args:
            told: The result of `ahead_of` for the sequences that have drafts.
        """
        asarray, result = self.cache.ops.asarray, Ahead([], [])
        of_rows = [[] if s is None else told.get(s, []) for s in self.sequences]
        for place in range(count - 1):
            states: States = []
            is_told: States = []
            for number, blank in enumerate(self._blanks()):
                known = [row[place][number] if place < len(row) else {} for row in of_rows]
                arrays = {name: _filled(zeros, name, known) for name, zeros in blank.items()}
                states.append({name: asarray(pair[0]) for name, pair in arrays.items()})
                is_told.append({name: asarray(pair[1]) for name, pair in arrays.items()})
            result.states.append(states)
            result.is_told.append(is_told)
        return result

    def _blanks(self) -> list[dict[str, np.ndarray]]:
        if self.blanks is None:
            to_numpy = self.cache.ops.to_numpy
            self.blanks = [
                {name: np.zeros_like(to_numpy(array)[0]) for name, array in state.items()}
                if needs_tokens(kind)
                else {}
                for kind, state in zip(self.kinds, self.states, strict=True)
            ]
        return self.blanks

    def tell(self, sequence: EngineSequence, tokens: Sequence[int]) -> None:
        """Give the tokens that have come to the processors that need them.

        The next step begins with the last of them.
        """
        ops, row = self.cache.ops, self.sequences.index(sequence)
        for number, processor in self.processors_of(sequence):
            if processor.needs_tokens:
                updated: dict[str, np.ndarray] = {}
                for token in tokens:
                    updated.update(processor.update(token))
                old = self.states[number]
                new = _arrays(ops, type(processor), [updated])
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


def _filled(
    zeros: np.ndarray, name: str, rows: Sequence[Mapping[str, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the array with a name of all rows, zeros in those without it, and which have it.

    Returns:
        The array (B, ...), and bool (B, ...) with axes of 1.
    """
    is_known = np.array([name in row for row in rows])
    array = np.stack([row.get(name, zeros) for row in rows])
    return array, is_known.reshape(-1, *(1 for _ in zeros.shape))


def first_states(ops: Backend, sequence: EngineSequence, vocab_size: int) -> States:
    """Return the states of a sequence's logits processors before its first token."""
    prompt = sequence.request.prompt_ids
    return [
        _arrays(ops, type(processor), [processor.start(prompt, vocab_size)])
        for processor in sequence.processors
    ]


def _arrays(
    ops: Backend, kind: type[LogitsProcessor], rows: Sequence[Mapping[str, np.ndarray]]
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
                f"{kind.__name__}: {name!r} of its state is {values.dtype}, "
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
