"""Changing the scores of the next token: the processors that a generation may have.

Processors come first in the sampler, before the repeat penalty. A processor computes on the device,
in the compiled step. What it computes depends on its class alone, so that a step is compiled once
for each combination of classes. What differs from one generation to the next is in its state:
arrays that the step is handed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from phicore.backend import Array, Backend
from phicore.errors import ArgumentError, PhicoreError


class LogitsProcessor(ABC):
    """Changes the scores in one generation. A new one is a subclass that has `apply`.

    A generation calls `start` once; then for every token `apply` and `advance`, on the device, and
    `update`, on the host. On the host a state is that of one sequence; on the device it is that of
    B sequences: the same arrays with an axis of B in front. All states of a generation have the
    same names, shapes and dtypes, none of 64 bits, and no method changes an array that it is
    handed. A processor that has `update` serves one generation.
    """

    def start(self, prompt: Sequence[int], vocab_size: int) -> Mapping[str, np.ndarray]:
        """Return the state for the first token, without an axis of B.

        Args:
            prompt: Token ids.
            vocab_size: V.
        """
        return {}

    @classmethod
    @abstractmethod
    def apply(cls, ops: Backend, logits: Array, state: Mapping[str, Array]) -> Array:
        """Return new scores. A compiler traces this, so it must not look at values.

        Args:
            logits: (B, V) float32.
            state: Arrays (B, ...).
        Returns:
            (B, V) float32; -infinity for a token that must not come.
        """

    @classmethod
    def advance(cls, ops: Backend, state: Mapping[str, Array], token: Array) -> Mapping[str, Array]:
        """Return the state after a token, (B, 1) int32. A compiler traces this, too."""
        return state

    def update(self, token: int) -> Mapping[str, np.ndarray]:
        """Return what only the host can tell of the state after a token, without an axis of B.

        The arrays replace those of the same names. With a processor that overrides this, a step
        waits until the last one's token is known.
        """
        return {}

    @property
    def needs_tokens(self) -> bool:
        """Whether `update` must be called."""
        return type(self).update is not LogitsProcessor.update


LARGEST = 1e30
"""A bias that is larger than any score, and far from infinity."""


class LogitBias(LogitsProcessor):
    """Adds a number to the scores of some tokens.

    Args:
        biases: By token id; -infinity forbids a token.
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
    def parse(cls, argument: str) -> LogitBias:
        """From `ID:BIAS,...`, where BIAS is a number or -inf.

        Raises:
            ArgumentError: If it is something else.
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
    """Makes tokens less likely that are in the answer already.

    Source: the penalties of OpenAI's API: score - frequency * count - presence * (count > 0), with
    the counts of the tokens generated so far.
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
    """Refuse arrays whose names, shapes or dtypes differ from those that they replace."""
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
"""phicore's own processors, made of what follows `--processor NAME=`."""
