"""The requests that the engine takes. All of their values are checked here."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from phicore.errors import ArgumentError
from phicore.network.processors import LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.text.stop_strings import checked_stops


@dataclass(frozen=True)
class Request:
    """A prompt, and the settings for generating its answer.

    Lists and other sequences are stored as tuples.

    Attributes:
        prompt_ids: The tokens of the prompt.
        sampling: The parameters of the sampler.
        max_tokens: The largest number of tokens of the answer.
        seed: The seed, 0 to 2**64 - 1. The same seed gives the same tokens. None is replaced by a
            random seed.
        ends: Tokens that end the answer.
        stop: Strings that end the answer's text. The engine ignores them, since it has no text.
        processors: The logits processors, in the order in which they run.
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

    def __post_init__(self) -> None:
        prompt_ids = tuple(int(i) for i in self.prompt_ids)
        if not prompt_ids:
            raise ArgumentError("expected at least one token, got none", parameter="prompt")
        if not is_integer(self.max_tokens) or self.max_tokens < 1:
            raise ArgumentError(parameter="max_tokens", expected="1 or more", got=self.max_tokens)
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
        }.items():
            object.__setattr__(self, name, value)


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of Python or NumPy. A bool does not count."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
