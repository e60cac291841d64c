"""The sampler, once, for every backend: pure functions of logits and of arrays of parameters.

Order: repeat penalty, temperature, top-k, top-p, min-p, then one token by the Gumbel-max rule.

The same seed gives the same token on every backend, but for near-ties: one uniform number per
token of the vocabulary comes from the host, and the largest sum of logit and noise wins. So two
backends differ only where their two best sums are closer than the rounding of the logits. With one
number per step and an inverse CDF, every boundary between two tokens of the vocabulary would be a
chance to differ (docs/architecture.md has what was measured).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from phicore.errors import ArgumentError
from phicore.protocol import Array, Backend

ONE = 2**30  # probability 1 as a count; the sum over a vocabulary stays below 2**31


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The defaults are those of the command line.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most probable tokens; 0 keeps all. Ties with the last are kept.
        top_p: Keep the most probable tokens until they hold this probability; 1 keeps all.
        min_p: Keep tokens that have at least this share of the most probable one's probability.
        repeat_penalty: Positive logits of recent tokens are divided by it, negative multiplied.
        repeat_last_n: How many recent tokens (prompt included) are penalized; 0 none, -1 all.
    """

    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.1
    repeat_last_n: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int, np.integer) if field.type == "int" else (int, float, np.number)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ArgumentError(f"{field.name}: expected {field.type}, got {value!r}")
        # The bounds of temperature and penalty keep them, and what they divide, in float32.
        is_good = self.temperature == 0 or 1e-6 <= self.temperature <= 1e6
        _check("temperature", self.temperature, is_good, "0 (greedy), or 1e-6 to 1e6")
        _check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 (all) to 2**31 - 1")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0, at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1")
        is_good = 1e-6 <= self.repeat_penalty <= 1e6
        _check("repeat_penalty", self.repeat_penalty, is_good, "1e-6 to 1e6")
        _check("repeat_last_n", self.repeat_last_n, self.repeat_last_n >= -1, "-1 (all) or more")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_filter(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def has_penalty(self) -> bool:
        return self.repeat_penalty != 1 and self.repeat_last_n != 0


def _check(name: str, value: float, is_good: bool, allowed: str) -> None:
    if not is_good:
        raise ArgumentError(f"{name}: expected {allowed}, got {value}")


def uniforms(seed: int, step: int, size: int) -> np.ndarray:
    """Numbers in (0, 1), one for each token of the vocabulary: (size,) float32.

    Philox is counter-based (Salmon et al., 2011): any step's numbers are had without the others',
    and the raw stream is the same in every NumPy version. Small numbers keep all their bits.
    """
    raw = np.random.Philox(key=seed, counter=step << 64).random_raw((size + 1) // 2)
    words = raw.astype("<u8").view("<u4")[:size]
    numbers = ((words + 0.5) * 2.0**-32).astype(np.float32)
    return np.minimum(numbers, np.float32(1 - 2**-24))


def sample(
    ops: Backend,
    logits: Array,
    penalty: Mapping[str, Array],
    draw: Mapping[str, Array] | None,
) -> Array:
    """Choose one token a row.

    Args:
        logits: (B, V) float32.
        penalty: `recent` (B, R) int32, newest last, -1 where there is none; `last_n` (B,) int32;
            `repeat_penalty` (B,) float32.
        draw: `uniforms` (B, V) float32; `temperature` (B,) float32; and, unless they leave out
            nothing in any row, `top_k` int32, `top_p` and `min_p` float32, (B,) each. A temperature
            of 0 makes that row greedy. None: all rows are greedy.
    Returns:
        (B,) int32; -1 where the logits hold a NaN or +infinity.
    """
    is_finite = ops.xp.max(logits, axis=-1) < float("inf")  # false for NaN too
    logits = ops.xp.where(is_finite[:, None], logits, 0.0)
    logits = apply_repeat_penalty(ops, logits, **penalty)
    best = ops.xp.astype(ops.xp.argmax(logits, axis=-1), ops.xp.int32)
    if draw is None:
        return ops.xp.where(is_finite, best, -1)
    is_greedy = draw["temperature"] == 0
    temperature = ops.xp.where(is_greedy, 1.0, draw["temperature"])[:, None]
    scaled = (logits - ops.xp.max(logits, axis=-1, keepdims=True)) / temperature
    scores = scaled + gumbel(ops, draw["uniforms"])
    if "top_k" in draw:
        is_kept = keep_likely(ops, scaled, draw["top_k"], draw["top_p"], draw["min_p"])
        scores = ops.xp.where(is_kept, scores, -float("inf"))
    drawn = ops.xp.astype(ops.xp.argmax(scores, axis=-1), ops.xp.int32)
    return ops.xp.where(is_finite, ops.xp.where(is_greedy, best, drawn), -1)


def gumbel(ops: Backend, uniforms: Array) -> Array:
    """Gumbel noise: the token with the largest sum of logit and noise is a draw from the softmax.

    Source: Gumbel (1954); Maddison et al., "A* Sampling" (2014), section 2.
    """
    return -ops.xp.log(-ops.xp.log1p(-uniforms))


def apply_repeat_penalty(
    ops: Backend, logits: Array, recent: Array, last_n: Array, repeat_penalty: Array
) -> Array:
    """Make the last n tokens less likely: logits > 0 are divided, the others multiplied.

    Source: Keskar et al., "CTRL" (2019), section 4.1, with the sign rule of transformers.
    """
    xp = ops.xp
    age = xp.arange(recent.shape[1], 0, -1, dtype=xp.int32)  # (R,): the newest is 1
    recent = xp.where(age[None, :] <= last_n[:, None], recent, -1)
    factor = repeat_penalty[:, None]
    penalized = xp.where(logits > 0, logits / factor, logits * factor)
    return xp.where(ops.contains(recent, logits.shape[-1]), penalized, logits)


def keep_likely(ops: Backend, scaled: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """Which tokens top-k, then top-p, then min-p leave: bool (B, V).

    Each of the three is a bound that a logit must reach, so that tied tokens share their fate and
    the result depends on no order. Top-p (Holtzman et al., 2019) keeps a token when those that are
    likelier hold less than p of what top-k has left; these sums are of integers, and so are the
    same in whatever order a library adds.

    Args:
        scaled: (B, V) float32, logits minus the largest, divided by the temperature.
        top_k: (B,) int32, 0 for all.
        top_p, min_p: (B,) float32.
    """
    xp = ops.xp
    vocab = scaled.shape[-1]
    ordered = -xp.sort(-scaled, axis=-1)  # (B, V), largest first
    k = xp.where(top_k == 0, vocab, xp.minimum(top_k, vocab))
    bound_k = xp.take_along_axis(ordered, k[:, None] - 1, axis=-1)  # (B, 1)

    weights = xp.where(ordered >= bound_k, xp.exp(ordered), 0.0)
    shares = weights / xp.sum(weights, axis=-1, keepdims=True)
    counts = xp.astype(xp.round(shares * ONE), xp.int32)
    running = xp.cumulative_sum(counts, axis=-1, dtype=xp.int32)
    most = xp.astype(running[:, -1:], xp.float32) * top_p[:, None]
    is_kept = (xp.astype(running - counts, xp.float32) < most) | (top_p[:, None] == 1)
    last = xp.sum(xp.astype(is_kept, xp.int32), axis=-1, keepdims=True, dtype=xp.int32) - 1
    last = xp.maximum(last, 0)  # a top_p that is 0 in float32 keeps the first too
    bound_p = xp.take_along_axis(ordered, last, axis=-1)

    is_likely = xp.exp(scaled) >= min_p[:, None]
    return (scaled >= xp.maximum(bound_k, bound_p)) & is_likely
