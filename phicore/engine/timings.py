"""How long a generation took, and how much it did."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Timings:
    """Where the time of a generation went, in seconds, and how much was done."""

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    """From the start to the first token, without compiling."""
    generated_tokens: int = 0
    decode_s: float = 0.0
    """From the first token to the last, without compiling."""
    compile_s: float = 0.0
    first_token_s: float = 0.0
    """From the start to the first token, compiling included."""

    def __post_init__(self) -> None:
        self._started = 0.0

    def start(self, prompt_tokens: int) -> None:
        """Begin to count."""
        self.prompt_tokens = prompt_tokens
        self._started = time.perf_counter()

    def count_token(self) -> None:
        """Count a token; the time that was spent compiling so far is in `compile_s` already."""
        since_start_s = time.perf_counter() - self._started
        if self.generated_tokens == 0:
            self.first_token_s = since_start_s
            self.prompt_s = since_start_s - self.compile_s
        self.generated_tokens += 1
        self.decode_s = since_start_s - self.compile_s - self.prompt_s

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """The speed of the tokens after the first; the first one's time is the prompt's."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0
