"""The requests that the engine takes. All of their values are checked here."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phicore.errors import ArgumentError
from phicore.network.logprobs import MOST
from phicore.network.processors import LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.text.stop_strings import checked_stops
from phicore.tools.choices import ToolUse

ROPE_FACTORS = ("auto", "long")
MOST_LOGPROBS = MOST
"""The largest number of alternatives whose log probabilities a request may ask for."""


@dataclass(frozen=True)
class Request:
    """A prompt, and the settings for generating its answer.

    Lists and other sequences are stored as tuples.

    Attributes:
        prompt_ids: The tokens of the prompt.
        sampling: The parameters of the sampler.
        max_tokens: The largest number of tokens of the answer; -1 is as many as the context holds.
        seed: The seed, 0 to 2**64 - 1. The same seed gives the same tokens. None is replaced by a
            random seed.
        ends: Tokens that end the answer.
        stop: Strings that end the answer's text. The engine ignores them, since it has no text.
        processors: The logits processors, in the order in which they run.
        rope_factors: One of `ROPE_FACTORS`. LongRoPE's short factors hold until a token beyond the
            original context is run ("auto", as in the reference), or never ("long").
        logprobs: Number of alternatives, 0 to `MOST_LOGPROBS`, whose log probabilities are computed
            at each token of the answer, beside the token's own. None computes none. The answer is
            the same in any case.
        tools: What the answer may call; None if it may call nothing. The engine ignores it, since
            it has no text.
        speculation: Whether tokens may be guessed and checked several at a time, if the engine has
            a drafter. The answer is the same in any case.
        prediction: Tokens that the answer is thought to resemble, which are guessed where it does.
            The answer is the same in any case.
    Raises:
        ArgumentError: If a value is not allowed. The error names the parameter, the allowed values
            and, unless the prompt is empty, the value.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    seed: int | None = None
    ends: frozenset[int] = frozenset()
    stop: str | Sequence[str] = ()
    processors: Sequence[LogitsProcessor] = ()
    rope_factors: str = ROPE_FACTORS[0]
    logprobs: int | None = None
    tools: ToolUse | None = None
    speculation: bool = True
    prediction: Sequence[int] = ()

    def __post_init__(self) -> None:
        prompt_ids = tuple(int(i) for i in self.prompt_ids)
        if not prompt_ids:
            raise ArgumentError("expected at least one token, got none", parameter="prompt")
        most = self.max_tokens
        if not is_integer(most) or (most < 1 and most != -1):
            expected = "1 or more, or -1 (until the context is full)"
            raise ArgumentError(parameter="max_tokens", expected=expected, got=most)
        if self.rope_factors not in ROPE_FACTORS:
            expected = " or ".join(ROPE_FACTORS)
            raise ArgumentError(parameter="rope_factors", expected=expected, got=self.rope_factors)
        if self.logprobs is not None:
            check_logprobs(self.logprobs)
        if not isinstance(self.speculation, bool):
            expected = "True or False"
            raise ArgumentError(parameter="speculation", expected=expected, got=self.speculation)
        seed = secrets.randbits(32) if self.seed is None else self.seed
        if not is_integer(seed) or not 0 <= seed < 2**64:
            raise ArgumentError(parameter="seed", expected="0 to 2**64 - 1", got=seed)
        for name, value in {
            "prompt_ids": prompt_ids,
            "max_tokens": int(self.max_tokens),
            "seed": int(seed),
            "ends": frozenset(self.ends),
            "stop": checked_stops(self.stop),
            "processors": tuple(self.processors),
            "prediction": tuple(int(i) for i in self.prediction),
        }.items():
            object.__setattr__(self, name, value)


def check_logprobs(count: Any) -> None:
    """Check a number of alternatives.

    Raises:
        ArgumentError: If it is not a whole number from 0 to `MOST_LOGPROBS`.
    """
    if not is_integer(count) or not 0 <= count <= MOST_LOGPROBS:
        expected = f"0 to {MOST_LOGPROBS}"
        raise ArgumentError(parameter="logprobs", expected=expected, got=count)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or NumPy. A bool does not count."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
