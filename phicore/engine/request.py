"""What is asked of the engine, checked once for everybody who asks."""

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
    """A prompt, and how its answer is made. Sequences are stored as tuples.

    Attributes:
        prompt_ids: The tokens of the prompt.
        sampling: How a token is chosen.
        max_tokens: How many tokens the answer has at most.
        seed: 0 to 2**64 - 1; the same seed gives the same tokens. None is replaced by a random one.
        ends: Tokens that end the answer.
        stop: Strings that end the answer's text. The engine, which has no text, ignores them.
        processors: What changes the scores before a token is chosen, in this order.
    Raises:
        ArgumentError: For a value that is not allowed, with the fields of the error set.
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
    """Whether a value is an integer of Python's or NumPy's, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
