"""Logits processors, which change the scores of the next token.

Processors run before the sampler and its repeat penalty, on the device, as part of the compiled
step. The computation depends only on the processor's class, so a step is compiled once for each
combination of classes. Everything that differs between generations is in the processor's state:
arrays that are arguments of the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from phicore.backend import Array, Backend
from phicore.errors import ArgumentError, PhicoreError


class LogitsProcessor(ABC):
    """Base class of logits processors. A subclass must define `apply`.

    A generation calls `start` once. For every token it then calls `apply` and `advance` on the
    device, and `update` on the host. A state on the host belongs to one sequence. A state on the
    device belongs to B sequences: its arrays have an additional first axis B. All states of a
    generation have the same names, shapes and dtypes, none of 64 bits. No method changes an array
    that it is given. A processor that overrides `update` is copied (`copy.copy`) before each
    `start`, so it may keep what it knows of an answer. If it overrides `ahead`, too, guesses of its
    answer's next tokens can be checked several at a time.
    """

    def start(self, prompt: Sequence[int], vocab_size: int) -> Mapping[str, np.ndarray]:
        """Return the state for the first token, without the axis B.

        Args:
            prompt: The token ids of the prompt.
            vocab_size: The size V of the vocabulary.
        """
        return {}

    @classmethod
    @abstractmethod
    def apply(cls, ops: Backend, logits: Array, state: Mapping[str, Array]) -> Array:
        """Return new scores. A compiler traces this method, so it must not read values.

        Args:
            logits: The scores, (B, V) float32.
            state: The state, arrays (B, ...).
        Returns:
            (B, V) float32, with -infinity for a forbidden token.
        """

    @classmethod
    def advance(cls, ops: Backend, state: Mapping[str, Array], token: Array) -> Mapping[str, Array]:
        """Return the state after a token, (B, 1) int32. A compiler traces this method, too."""
        return state

    def update(self, token: int) -> Mapping[str, np.ndarray]:
        """Return the arrays of the state that the host computes after a token, without the axis B.

        They replace the arrays of the state with these names. If a processor overrides this
        method, each step waits until the previous step's token is known.
        """
        return {}

    def ahead(self, tokens: Sequence[int]) -> Sequence[Mapping[str, np.ndarray]]:
        """Return what `update` would return after each of the tokens, if they were the next ones.

        Nothing is committed: the next call of `update` says which token has come. A processor that
        overrides `update` and not this method never has more than one token checked in a step.

        Args:
            tokens: A guess of the next tokens.
        Returns:
            The arrays after each token, up to the first token that is forbidden where it stands.
            The guess is cut there, so the result may be shorter than the guess.
        """
        return []

    def forced(self) -> Sequence[int]:
        """Return the tokens that come next in all likelihood, since little else is allowed.

        They are a guess, so they may be wrong. They are asked for with speculation only.
        """
        return ()

    @classmethod
    def neutral(cls, vocab_size: int) -> Mapping[str, np.ndarray] | None:
        """Return a state with which `apply` leaves all scores as they are, whatever tokens come.

        With it, sequences without such a processor share the steps of those that have one. None
        means that there is no such state, so they are computed in steps of their own.

        Returns:
            Arrays with the names, shapes and dtypes of those of `start`, without the axis B.
        """
        return None

    @property
    def needs_tokens(self) -> bool:
        """Return whether the processor overrides `update`, which is then called for each token."""
        return needs_tokens(type(self))

    @property
    def looks_ahead(self) -> bool:
        """Return whether `ahead` knows what `update` does: no subclass overrides `update` alone."""
        return _knows(type(self), "ahead", {"update"})


def needs_tokens(kind: type[LogitsProcessor]) -> bool:
    """Return whether the processors of a class need each token on the host."""
    return kind.update is not LogitsProcessor.update


def has_neutral(kind: type[LogitsProcessor]) -> bool:
    """Return whether a class has a neutral state, and no subclass changes what that means."""
    is_known = _knows(kind, "neutral", {"start", "apply", "advance"})
    return is_known and kind.neutral(1) is not None


def _knows(kind: type[LogitsProcessor], name: str, others: set[str]) -> bool:
    """Return whether a method is overridden, and no subclass overrides other methods without it."""
    first = next(each for each in kind.__mro__ if {name, *others} & vars(each).keys())
    return first is not LogitsProcessor and name in vars(first)


Kinds = tuple[type[LogitsProcessor], ...]
"""The classes of the logits processors that are compiled into a step."""

LARGEST = 1e30
"""The largest allowed bias: larger than any score, and far from overflow in float32."""


class LogitBias(LogitsProcessor):
    """Adds a bias to the scores of some tokens.

    Args:
        biases: The biases by token id; -infinity forbids a token.
    """

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._biases = dict(biases)

    def start(self, prompt: Sequence[int], vocab_size: int) -> Mapping[str, np.ndarray]:
        bias = np.zeros(vocab_size, np.float32)
        for token, value in self._biases.items():
            if not 0 <= token < vocab_size:
                raise ArgumentError(f"logit-bias: token id {token}: expected 0 to {vocab_size - 1}")
            bias[token] = value
        return {"bias": bias}

    @classmethod
    def apply(cls, ops: Backend, logits: Array, state: Mapping[str, Array]) -> Array:
        return logits + state["bias"]

    @classmethod
    def neutral(cls, vocab_size: int) -> Mapping[str, np.ndarray]:
        return {"bias": np.zeros(vocab_size, np.float32)}

    @classmethod
    def parse(cls, argument: str) -> LogitBias:
        """Make a processor from `ID:BIAS,...`, where BIAS is a number or -inf.

        Raises:
            ArgumentError: If the argument does not have this form.
        """
        biases = {}
        for part in argument.split(","):
            token, _, value = part.partition(":")
            try:
                biases[int(token)] = float(value)
                is_good = biases[int(token)] <= LARGEST  # false for NaN too
            except ValueError:
                is_good = False
            if not is_good:
                raise ArgumentError(
                    f"logit-bias: expected ID:BIAS,... such as 42:-inf; got {part!r}"
                )
        return cls(biases)


class AnswerPenalty(LogitsProcessor):
    """Makes tokens less likely that the answer already contains.

    The new score is score - frequency * count - presence * (count > 0), where count is the number
    of times that the token was generated so far.

    Source: the frequency and presence penalties of OpenAI's API.
    """

    def __init__(self, *, frequency: float = 0.0, presence: float = 0.0) -> None:
        self._factors = {"frequency": frequency, "presence": presence}

    def start(self, prompt: Sequence[int], vocab_size: int) -> Mapping[str, np.ndarray]:
        counts = np.zeros(vocab_size, np.float32)
        return {
            "counts": counts,
            **{name: np.array([f], np.float32) for name, f in self._factors.items()},
        }

    @classmethod
    def apply(cls, ops: Backend, logits: Array, state: Mapping[str, Array]) -> Array:
        counts = state["counts"]
        presence = ops.xp.where(counts > 0, state["presence"], 0.0)
        return logits - (counts * state["frequency"] + presence)

    @classmethod
    def advance(cls, ops: Backend, state: Mapping[str, Array], token: Array) -> Mapping[str, Array]:
        xp, counts = ops.xp, state["counts"]
        is_token = xp.arange(counts.shape[1], dtype=xp.int32)[None, :] == token
        return {**state, "counts": counts + xp.astype(is_token, xp.float32)}

    @classmethod
    def neutral(cls, vocab_size: int) -> Mapping[str, np.ndarray]:
        return cls().start((), vocab_size)


def _penalty(name: str, argument: str) -> AnswerPenalty:
    try:
        value = float(argument)
        is_good = -1e6 <= value <= 1e6  # false for NaN
    except ValueError:
        is_good = False
    if not is_good:
        raise ArgumentError(f"{name}-penalty: expected a number, got {argument!r}")
    return AnswerPenalty(**{name: value})


def check_same(what: str, old: Mapping[str, Array], new: Mapping[str, Array]) -> None:
    """Check that the arrays in `new` have the same names, shapes and dtypes as those in `old`.

    Raises:
        PhicoreError: If an array differs, is missing or is new. The message starts with `what`.
    """
    kinds = [{name: (tuple(a.shape), a.dtype) for name, a in d.items()} for d in (old, new)]
    for name in old.keys() | new.keys():
        expected, found = (kind.get(name) for kind in kinds)
        if expected != found:
            said = [k and f"{k[1]} {list(k[0])}" for k in (expected, found)]
            raise PhicoreError(f"{what}: {name}: expected {said[0]}, got {said[1]}")


BUILT_IN: Mapping[str, Callable[[str], LogitsProcessor]] = {
    "logit-bias": LogitBias.parse,
    "frequency-penalty": lambda argument: _penalty("frequency", argument),
    "presence-penalty": lambda argument: _penalty("presence", argument),
}
"""phicore's own processors: functions that make one from the text after `--processor NAME=`."""
