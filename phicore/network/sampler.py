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

from phicore.backend import Array, Backend
from phicore.errors import ArgumentError

ONE = 2**30  # probability 1 as a count; the sum over a vocabulary stays below 2**31
ALL = 2**31 - 1  # a count that no vocabulary has
BLOCK = 64  # of tokens; divides the vocabularies of Phi-3, Phi-4-mini and SmolLM2


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. The defaults are llama.cpp's.

    With them a tenth of a small model's answers go wrong; without a filter, at a temperature of 0.7
    and with a repeat penalty of 1.1, it is a quarter (docs/architecture.md).

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most probable tokens; 0 keeps all. Ties with the last are kept.
        top_p: Keep the most probable tokens until they hold this probability; 1 keeps all.
        min_p: Keep tokens that have at least this share of the most probable one's probability.
        repeat_penalty: Positive logits of recent tokens are divided by it, negative multiplied; 1
            changes nothing.
        repeat_last_n: How many recent tokens (prompt included) are penalized; 0 none, -1 all.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
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
    words = raw.astype("<u8", copy=False).view("<u4")[:size]
    numbers = np.empty(size, np.float32)
    np.add(words, 0.5, out=numbers, casting="same_kind")  # in float64, then rounded
    numbers *= np.float32(2.0**-32)
    return np.minimum(numbers, np.float32(1 - 2**-24), out=numbers)


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
        (B,) int32; -1 where the penalized logits hold a NaN or +infinity, or only -infinity.
    """
    xp = ops.xp
    logits = apply_repeat_penalty(ops, logits, **penalty)
    largest = xp.max(logits, axis=-1, keepdims=True)  # (B, 1)
    is_finite = (largest > -float("inf")) & (largest < float("inf"))  # false for NaN too
    logits, largest = xp.where(is_finite, logits, 0.0), xp.where(is_finite, largest, 0.0)
    best = argmax(ops, logits)
    if draw is None:
        return xp.where(is_finite[:, 0], best, -1)
    is_greedy = draw["temperature"] == 0
    scaled = (logits - largest) / xp.where(is_greedy, 1.0, draw["temperature"])[:, None]
    scores = scaled + gumbel(ops, draw["uniforms"])
    if "top_k" in draw:
        is_kept = keep_likely(ops, scaled, draw["top_k"], draw["top_p"], draw["min_p"])
        scores = xp.where(is_kept, scores, -float("inf"))
    drawn = argmax(ops, scores)
    return xp.where(is_finite[:, 0], xp.where(is_greedy, best, drawn), -1)


def argmax(ops: Backend, x: Array) -> Array:
    """Where each row of (B, V) has its largest number, the first of equal ones: (B,) int32.

    It is sought among the largest of blocks, then in its block. On a CPU, XLA vectorizes max but
    not argmax, nor what it fuses into that: a draw from 49,152 tokens would take 1.3 ms, not 0.1.
    """
    xp = ops.xp
    batch, size = x.shape
    if size % BLOCK:
        padding = xp.zeros((batch, -size % BLOCK), dtype=xp.float32) - float("inf")
        x = xp.concat([x, padding], axis=1)
    blocks = xp.reshape(x, (batch, -1, BLOCK))
    best = xp.argmax(xp.max(blocks, axis=-1), axis=-1)[:, None, None]  # (B, 1, 1)
    block = xp.take_along_axis(blocks, xp.broadcast_to(best, (batch, 1, BLOCK)), axis=1)
    return xp.astype(best[:, 0, 0] * BLOCK + xp.argmax(block[:, 0, :], axis=-1), xp.int32)


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
    k = xp.where(top_k == 0, ALL, top_k)
    ones = xp.zeros(scaled.shape, dtype=xp.int32) + 1
    is_kept = ops.largest(scaled, ones, k)

    likely = xp.exp(scaled)
    weights = xp.where(is_kept, likely, 0.0)
    shares = weights / xp.sum(weights, axis=-1, keepdims=True)
    counts = xp.astype(xp.round(shares * ONE), xp.int32)
    most = xp.astype(xp.sum(counts, axis=-1, dtype=xp.int32), xp.float32) * top_p
    most = xp.maximum(xp.astype(xp.round(most), xp.int32), 1)  # top_p may be 0 in float32
    is_kept = is_kept & ops.largest(scaled, counts, xp.where(top_p == 1, ALL, most))
    return is_kept & (likely >= min_p[:, None])
