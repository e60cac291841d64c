"""Rows of activations that each have a matrix of their own, of a few: sorted by it."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import jax.numpy as jnp
from jax import lax

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


def products_by_tiles(
    x: Array, experts: Array, count: int, rows: int, product: Callable[[Array, Array], Array]
) -> Array:
    """(M, K), each row by the matrix of its expert, int32 (M,): (M, N).

    Args:
        count: How many matrices there are.
        rows: N.
        product: Of rows of x by the matrix with a number, an int32.
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
