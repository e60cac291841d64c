"""What is told about the probability of a token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprobs:
    """The log probability of a token, and the likeliest tokens in its place.

    Log probabilities are natural logarithms, computed in float32: the log-softmax of the model's
    logits, before penalties, logits processors, temperature and filters.

    Attributes:
        token: The token.
        logprob: Its log probability.
        top: The likeliest tokens and their log probabilities, as many as were asked for, or the
            whole vocabulary if it has fewer. The likeliest comes first; of equally likely tokens,
            the one with the lower id. The token itself is among them only if it is so likely.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
