"""Running requests, called sequences: their data on the host. `rows.py` has the device arrays."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens
from copy import copy
from dataclasses import dataclass, field

from phicore.engine.request import Request
from phicore.engine.timings import Timings
from phicore.network.processors import Kinds
from phicore.text.logprobs import TokenLogprobs


@dataclass(eq=False)
class Sequence:
    """A running request, and its progress so far.

    Attributes:
        request: The request.
        limit: The largest number of tokens of the answer: what was requested, or less if the
            context holds less.
        at_limit: The finish reason at the limit, "length" or "context".
        is_long: Whether the sequence is rotated by LongRoPE's long factors.
        given: Number of tokens that are read in chunks before the next one is sampled: the prompt;
            and once a sequence is read again, its answer so far, too.
        computed: Number of tokens that were run through the network.
        sampled: Number of tokens of the answer that were sampled. The host may not have read the
            last ones yet.
        answer: The tokens of the answer that the host has read.
        outputs: The outputs that nobody has taken yet, the oldest first.
        finish_reason: Why the sequence has ended; None as long as it goes on.
        timings: The times and token counts so far.
        processors: The logits processors of the request. Those that need tokens on the host are
            copies.
    """

    request: Request
    limit: int
    at_limit: str
    is_long: bool
    given: int = 0
    computed: int = 0
    sampled: int = 0
    answer: list[int] = field(default_factory=list)
    outputs: deque[Output] = field(default_factory=deque)
    finish_reason: str | None = None
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        self.given = len(self.request.prompt_ids)
        # Several sequences may have one request; each follows its own tokens.
        given = self.request.processors
        self.processors = tuple(copy(p) if p.needs_tokens else p for p in given)

    @property
    def tokens(self) -> Tokens[int]:
        """Return the tokens of the prompt, and of the answer as far as the host has read it."""
        return [*self.request.prompt_ids, *self.answer]

    @property
    def is_read(self) -> bool:
        """Return whether every given token was run through the network."""
        return self.computed >= self.given

    @property
    def is_read_again(self) -> bool:
        """Return whether the given tokens are more than the prompt."""
        return self.given > len(self.request.prompt_ids)

    def read_again(self, *, is_long: bool) -> None:
        """Begin anew with all tokens given, for an empty cache."""
        self.is_long = is_long
        self.given = len(self.tokens)
        self.computed = 0

    def begin_at(self, count: int) -> None:
        """Go on after the first `count` given tokens, since something else has computed these."""
        if not self.is_read_again:
            self.timings.cached_tokens += count - self.computed
        self.computed = count

    @property
    def kinds(self) -> Kinds:
        """Return the classes of the logits processors."""
        return tuple(type(processor) for processor in self.processors)

    @property
    def needs_tokens(self) -> bool:
        """Return whether a logits processor needs each token before the next is sampled."""
        return any(processor.needs_tokens for processor in self.processors)

    @property
    def can_be_checked(self) -> bool:
        """Return whether a step may check several tokens: the states after each can be told."""
        return all(p.looks_ahead for p in self.processors if p.needs_tokens)

    @property
    def left(self) -> int:
        """Return the number of tokens of the answer that may still be sampled."""
        return self.limit - self.sampled


class SequenceError(Exception):
    """An error that concerns one sequence, while others go on.

    Attributes:
        sequence: The sequence.
        error: The error.
    """

    def __init__(self, sequence: Sequence, error: Exception) -> None:
        super().__init__(str(error))
        self.sequence = sequence
        self.error = error


@dataclass(frozen=True)
class Output:
    """The result of a step for a sequence.

    Attributes:
        sequence: The sequence.
        tokens: New tokens of its answer; none while the prompt is read.
        finish_reason: None if the sequence continues; otherwise "stop" (an end token), "length",
            "context" or "error".
        error: The error that has ended the sequence, if it was one.
        logprobs: The log probabilities of the tokens; empty unless the request asks for them.
    """

    sequence: Sequence
    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
    error: Exception | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Return whether the step read a part of a prompt, and the sequence continues."""
        return not self.tokens and self.finish_reason is None and self.error is None
