"""A sequence: a request under way, as the host knows it. Its device arrays are in `slots.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from phicore.engine.request import Request
from phicore.engine.timings import Timings


@dataclass(eq=False)
class Sequence:
    """A request under way.

    Attributes:
        request: What is asked for.
        limit: How many tokens the answer has at most; the context may hold fewer than asked for.
        at_limit: The reason to finish there: "length" or "context".
        is_long: Whether its keys are rotated by LongRoPE's long factors.
        computed: How many of its tokens were run through the network.
        sampled: How many tokens of the answer were sampled, perhaps not read yet.
        answer: The tokens of the answer that were read.
        slot: Where its arrays are on the device; None while it waits, and when it has ended.
        timings: What was done so far, and how long it took.
    """

    request: Request
    limit: int
    at_limit: str
    is_long: bool
    computed: int = 0
    sampled: int = 0
    answer: list[int] = field(default_factory=list)
    slot: int | None = None
    timings: Timings = field(default_factory=Timings)

    @property
    def is_prompt_read(self) -> bool:
        """Whether every token of the prompt was run through the network."""
        return self.computed >= len(self.request.prompt_ids)

    @property
    def needs_tokens(self) -> bool:
        """Whether a logits processor must know each token before the next one is sampled."""
        return any(processor.needs_tokens for processor in self.request.processors)

    @property
    def left(self) -> int:
        """How many tokens of the answer may still be sampled."""
        return self.limit - self.sampled


@dataclass(frozen=True)
class Output:
    """What a step gave a sequence.

    Attributes:
        sequence: The sequence.
        tokens: New tokens of its answer; none while the prompt is read.
        finish_reason: None while it goes on; else "stop" (an end token), "length" or "context".
    """

    sequence: Sequence
    tokens: tuple[int, ...] = ()
    finish_reason: str | None = None
