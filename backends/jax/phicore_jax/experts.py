"""Products of activation rows and their experts' matrices, with the rows grouped by expert."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import jax.numpy as jnp
from jax import lax

Array = Any


def in_tiles(experts: Array, count: int, tile: int) -> tuple[Array, Array]:
    """Group rows into tiles, each with rows of one expert only.

    Args:
        experts: (M,) int32 below `count`, the expert of each row.
        count: The number of experts.
        tile: The number of slots for rows in a tile.
    Returns:
        `order` (tiles * tile,) int32, the row in each slot of the tiles, or -1 for an empty slot;
        and `firsts` (count + 1,) int32: expert i has tiles firsts[i] up to firsts[i + 1] - 1.
    """
    m = experts.shape[0]
    is_of = (experts[:, None] == jnp.arange(count, dtype=jnp.int32)[None]).astype(
        jnp.int32
    )  # (M, X)
    rank = jnp.take_along_axis(jnp.cumsum(is_of, axis=0), experts[:, None], axis=1)[:, 0] - 1
    ends = jnp.cumsum((is_of.sum(axis=0) + (tile - 1)) // tile)
    firsts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    tiles = min(m, (m + count * (tile - 1)) // tile)  # an upper bound
    order = jnp.full(tiles * tile, -1, jnp.int32)
    slots = firsts[experts] * tile + rank
    return order.at[slots].set(jnp.arange(m, dtype=jnp.int32)), firsts


def products_by_tiles(
    x: Array, experts: Array, count: int, rows: int, product: Callable[[Array, Array], Array]
) -> Array:
    """Multiply each row of x (M, K) by the matrix of its expert: (M, N) float32.

    Args:
        experts: (M,) int32, the expert of each row.
        count: The number of experts.
        rows: N.
        product: A function that multiplies some rows (m, K) by the matrix with a number, an int32.
    """
    m = x.shape[0]
    tile = ceil(m / count)
    order, firsts = in_tiles(experts, count, tile)

    def add_tile(t: Array, y: Array) -> Array:
        of_tile = lax.dynamic_slice_in_dim(order, t * tile, tile)
        number = jnp.searchsorted(firsts, t, side="right").astype(jnp.int32) - 1
        of_tile = jnp.where(of_tile < 0, m, of_tile)  # a negative index would count from the end
        return y.at[of_tile].set(product(x[of_tile], number), mode="drop")

    y = jnp.zeros((m, rows), jnp.float32)
    return lax.fori_loop(0, firsts[count], add_tile, y)
