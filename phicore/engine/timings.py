"""The times and token counts of a generation."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class Timings:
    """The times of a generation in seconds, and its numbers of tokens."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """The number of the prompt's tokens that were computed before, for another sequence."""
    prompt_s: float = 0.0
    """The time from the start to the first token, without compiling."""
    generated_tokens: int = 0
    decode_s: float = 0.0
    """The time from the first token to the last, without compiling and without `again_s`."""
    again_s: float = 0.0
    """The time in which all tokens were read again with LongRoPE's long factors, until the next
    token, without compiling."""
    compile_s: float = 0.0
    first_token_s: float = 0.0
    """The time from the start to the first token, compiling included."""
    drafts: int = 0
    """The number of drafts that were checked."""
    drafted_tokens: int = 0
    """The number of guessed tokens that were checked."""
    accepted_tokens: int = 0
    """The number of guessed tokens that were right, and came without a step of their own."""

    def __post_init__(self) -> None:
        self._started = 0.0
        self._again: float | None = None

    def start(self, prompt_tokens: int) -> None:
        """Start the clock."""
        self.prompt_tokens = prompt_tokens
        self._started = time.perf_counter()

    def start_again(self) -> None:
        """Note that all tokens are read again. `compile_s` must be up to date."""
        self._again = time.perf_counter() - self.compile_s

    def count_token(self) -> None:
        """Count a token and update the times. `compile_s` must be up to date."""
        now = time.perf_counter()
        since_start_s = now - self._started
        if self._again is not None:
            self.again_s += now - self.compile_s - self._again
            self._again = None
        if self.generated_tokens == 0:
            self.first_token_s = since_start_s
            self.prompt_s = since_start_s - self.compile_s
        self.generated_tokens += 1
        self.decode_s = since_start_s - self.compile_s - self.prompt_s - self.again_s

    @property
    def prompt_tokens_per_s(self) -> float:
        """Return the speed of the prompt's tokens that were computed."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Return the speed of all tokens after the first, whose time belongs to the prompt."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0
