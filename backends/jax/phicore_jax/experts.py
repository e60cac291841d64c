"""Rows of activations sorted by the matrix that each is multiplied by."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

Array = Any


def in_tiles(experts: Array, count: int, tile: int) -> tuple[Array, Array]:
    """Put rows in tiles that have rows of one expert each.

    Args:
        experts: (M,) int32 below `count`, the expert of each row.
        tile: Rows of a tile.
    Returns:
        `order` (tiles * tile,) int32, the row in each slot of the tiles, or -1; and `firsts`
        (count + 1,) int32: expert i has the tiles from firsts[i] to firsts[i + 1].
    """
    m = experts.shape[0]
    is_of = (experts[:, None] == jnp.arange(count, dtype=jnp.int32)[None]).astype(
        jnp.int32
    )  # (M, X)
    rank = jnp.take_along_axis(jnp.cumsum(is_of, axis=0), experts[:, None], axis=1)[:, 0] - 1
    ends = jnp.cumsum((is_of.sum(axis=0) + (tile - 1)) // tile)
    firsts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    tiles = min(m, (m + count * (tile - 1)) // tile)  # at most
    order = jnp.full(tiles * tile, -1, jnp.int32)
    slots = firsts[experts] * tile + rank
    return order.at[slots].set(jnp.arange(m, dtype=jnp.int32)), firsts
