"""The sampler, written once for all backends: pure functions of logits and parameter arrays.

The order is repeat penalty, temperature, top-k, top-p, min-p. The Gumbel-max rule then draws one
token.

The same seed gives the same token on every backend, except in near-ties. There is one uniform
random number for each token of the vocabulary, with the same bits whether the host makes it or the
device (`Backend.uniforms`), and the largest sum of logit and noise wins. So two backends differ
only if the two best sums are closer than the rounding of the logits. With one number per step and
an inverse CDF, backends could differ at every boundary between two tokens of the vocabulary
(docs/architecture.md has measurements).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phicore.backend import Array, Backend
from phicore.network.sampling import FILTERS, Sampling

ONE = 2**30  # probability 1 as a count; the sum over a vocabulary stays below 2**31
ALL = 2**31 - 1  # a count that no vocabulary has
BLOCK = 64  # tokens; divides the vocabulary sizes of Phi-3, Phi-4-mini and SmolLM2


def uniforms(seed: int, step: int, size: int) -> np.ndarray:
    """Make random numbers in (0, 1), one for each token of the vocabulary: (size,) float32.

    Philox is counter-based (Salmon et al., 2011), so the numbers of a step do not depend on earlier
    calls. Its raw stream is the same in every NumPy version. Small numbers keep all their bits.
    """
    raw = np.random.Philox(key=seed, counter=step << 64).random_raw((size + 1) // 2)
    words = raw.astype("<u8", copy=False).view("<u4")[:size]
    numbers = np.empty(size, np.float32)
    np.add(words, 0.5, out=numbers, casting="same_kind")  # in float64, then rounded
    numbers *= np.float32(2.0**-32)
    return np.minimum(numbers, np.float32(1 - 2**-24), out=numbers)


def inputs(samplings: Sequence[Sampling]) -> dict[str, np.ndarray] | None:
    """Make the argument `draw` of `sample` for B rows, without the random numbers.

    Returns:
        Host arrays (B,): `temperature` and, if some row has a filter, each of `FILTERS`.
        None if all rows are greedy.
    """
    if all(sampling.is_greedy for sampling in samplings):
        return None
    names: dict[str, type[np.number[Any]]] = {"temperature": np.float32}
    if any(sampling.has_filter for sampling in samplings):
        for name, neutral in FILTERS.items():
            names[name] = np.int32 if isinstance(neutral, int) else np.float32
    return {
        name: np.array([getattr(sampling, name) for sampling in samplings], dtype)
        for name, dtype in names.items()
    }


def sample(
    ops: Backend,
    logits: Array,
    penalty: Mapping[str, Array],
    draw: Mapping[str, Array] | None,
) -> Array:
    """Choose one token for each row.

    Args:
        logits: The scores, (B, V) float32.
        penalty: `recent` (B, R) int32, the recent tokens, newest last, padded with -1; `last_n`
            (B,) int32; `repeat_penalty` (B,) float32.
        draw: `temperature` (B,) float32; if a row has a filter, each of `FILTERS`, (B,) int32 or
            float32; and the random numbers, `uniforms` (B, V) float32, or the arguments `key` and
            `step` of `Backend.uniforms`. A temperature of 0 makes its row greedy. None means that
            all rows are greedy.
    Returns:
        Token ids, (B,) int32; -1 if the penalized logits of a row have a NaN or +infinity, or only
        -infinity.
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
    numbers = draw.get("uniforms")
    if numbers is None:
        numbers = ops.uniforms(draw["key"], draw["step"], logits.shape[1])
    scores = scaled + gumbel(ops, numbers)
    if filters := {name: draw[name] for name in FILTERS if name in draw}:
        is_kept = keep_likely(ops, scaled, **filters)
        scores = xp.where(is_kept, scores, -float("inf"))
    drawn = argmax(ops, scores)
    return xp.where(is_finite[:, 0], xp.where(is_greedy, best, drawn), -1)


def argmax(ops: Backend, x: Array) -> Array:
    """Return the index of the largest number in each row of (B, V), the first if tied: (B,) int32.

    This finds the block with the largest number, then searches that block alone. On a CPU, XLA
    vectorizes max, but neither argmax nor the operations that it fuses into argmax. A plain argmax
    would make a draw from 49,152 tokens take 1.3 ms instead of 0.1 ms.
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
    """Turn uniform numbers into Gumbel noise.

    The token with the largest sum of logit and noise is a draw from the softmax.

    Source: Gumbel (1954); Maddison et al., "A* Sampling" (2014), section 2.
    """
    return -ops.xp.log(-ops.xp.log1p(-uniforms))


def apply_repeat_penalty(
    ops: Backend, logits: Array, recent: Array, last_n: Array, repeat_penalty: Array
) -> Array:
    """Make recent tokens less likely: divide their logits > 0 by the penalty, multiply the rest.

    Source: Keskar et al., "CTRL" (2019), section 4.1, with the sign rule of transformers.
    """
    xp = ops.xp
    age = xp.arange(recent.shape[1], 0, -1, dtype=xp.int32)  # (R,): the newest is 1
    recent = xp.where(age[None, :] <= last_n[:, None], recent, -1)
    factor = repeat_penalty[:, None]
    penalized = xp.where(logits > 0, logits / factor, logits * factor)
    return xp.where(ops.contains(recent, logits.shape[-1]), penalized, logits)


def keep_likely(ops: Backend, scaled: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """Apply top-k, then top-p, then min-p; return which tokens are kept, bool (B, V).

    Each filter is a lower bound for the logit. So tied tokens are kept or dropped together, and the
    result does not depend on an order. Top-p (Holtzman et al., 2019) keeps a token if the likelier
    tokens together have less than p of the probability that top-k kept. Probabilities are summed as
    integers, so the sum does not depend on the order in which a library adds.

    Args:
        scaled: The logits minus the row's largest, divided by the temperature, (B, V) float32.
        top_k: (B,) int32; 0 keeps all.
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
