"""Log probabilities of tokens, written once for all backends: pure functions of logits.

The likeliest tokens are selected without sorting, which some libraries do slowly or with ties in
any order. The largest numbers of groups of 8 form a row of an eighth of the length, and so on,
until a row is short. From there the way leads back: the 20 largest numbers are in the 20 groups
whose largest numbers are the largest. Of the 160 candidates, each is compared with each. On a CPU,
this takes XLA about as long as its own `top_k`.
"""

from __future__ import annotations

from phicore.backend import Array, Backend

MOST = 20
"""The number of likeliest tokens that are computed. A request may ask for fewer."""
GROUP = 8
"""The number of numbers of which the largest is looked for."""
SUMMED = 64
"""The number of numbers that are added one after the other."""


def logprobs(ops: Backend, logits: Array, tokens: Array) -> dict[str, Array]:
    """Compute the log probabilities of a token of each row, and of the row's likeliest tokens.

    Args:
        logits: The scores, (M, V) float32.
        tokens: The tokens, (M,) int32. If one is below 0, its result is garbage.
    Returns:
        `chosen` (M,) float32: the log-softmax of the logits at `tokens`; `ids` (M, N) int32 and
        `likeliest` (M, N) float32: the likeliest tokens in descending order, ties by the lower id,
        and their log probabilities. N is `MOST`, or V if that is less. Log probabilities are NaN in
        a row that has a NaN or +infinity, or only -infinity.
    """
    xp = ops.xp
    size = logits.shape[1]
    largest = xp.max(logits, axis=-1, keepdims=True)  # (M, 1)
    is_finite = (largest > -float("inf")) & (largest < float("inf"))  # false for NaN too
    shifted = xp.where(is_finite, logits, 0.0) - xp.where(is_finite, largest, 0.0)
    found = shifted - xp.log(_sum(ops, xp.exp(shifted)))  # (M, V)
    ids = _largest(ops, found, min(MOST, size))
    chosen = xp.where((tokens >= 0) & (tokens < size), tokens, 0)[:, None]
    found = xp.where(is_finite, found, float("nan"))
    return {
        "chosen": xp.take_along_axis(found, chosen, axis=1)[:, 0],
        "ids": ids,
        "likeliest": xp.take_along_axis(found, ids, axis=1),
    }


def _groups(ops: Backend, x: Array, size: int, padding: float) -> Array:
    """Cut rows into groups: (M, n) gives (M, any, size)."""
    xp, rest = ops.xp, -x.shape[1] % size
    if rest:
        x = xp.concat([x, xp.zeros((x.shape[0], rest), dtype=xp.float32) + padding], axis=1)
    return xp.reshape(x, (x.shape[0], -1, size))


def _sum(ops: Backend, x: Array) -> Array:
    """Add the numbers of each row: (M, n) gives (M, 1).

    Sums of sums are exact enough where a library adds all numbers one after the other, as MLX does.
    """
    while x.shape[1] > 1:
        x = ops.xp.sum(_groups(ops, x, SUMMED, 0.0), axis=-1)
    return x


def _largest(ops: Backend, x: Array, count: int) -> Array:
    """Return the indices of the `count` largest numbers of each row, as `_first` orders them.

    Args:
        x: The numbers, (M, V) float32 without NaN, V of at least `count`.
    """
    xp, rows = ops.xp, x.shape[0]
    levels = [_groups(ops, x, GROUP, -float("inf"))]
    while levels[-1].shape[1] > count:
        levels.append(_groups(ops, xp.max(levels[-1], axis=-1), GROUP, -float("inf")))
    top = levels[-1].shape[1]
    chosen = xp.broadcast_to(xp.arange(top, dtype=xp.int32)[None, :], (rows, top))
    within = xp.arange(GROUP, dtype=xp.int32)[None, None, :]
    for level in reversed(levels):  # `chosen` are groups of this level
        ids = xp.reshape(chosen[:, :, None] * GROUP + within, (rows, -1))
        numbers = xp.take_along_axis(xp.reshape(level, (rows, -1)), ids, axis=1)
        chosen = _first(ops, numbers, ids, count)
    return chosen


def _first(ops: Backend, numbers: Array, ids: Array, count: int) -> Array:
    """Return the ids of the `count` largest numbers in descending order, ties by the lower id.

    Args:
        numbers: (M, n) float32 without NaN.
        ids: The id of each number, (M, n) int32. All of a row are different.
    Returns:
        (M, count) int32.
    """
    xp = ops.xp
    other, one = numbers[:, None, :], numbers[:, :, None]
    is_before = (other > one) | ((other == one) & (ids[:, None, :] < ids[:, :, None]))  # (M, n, n)
    rank = xp.sum(xp.astype(is_before, xp.int32), axis=-1, dtype=xp.int32)  # (M, n)
    is_at = rank[:, None, :] == xp.arange(count, dtype=xp.int32)[None, :, None]  # (M, count, n)
    return xp.sum(xp.where(is_at, ids[:, None, :], 0), axis=-1, dtype=xp.int32)
