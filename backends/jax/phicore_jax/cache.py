"""The cache by XLA: how rows of keys and values are stored, and put in place.

Two types differ from `phicore.backend.cache_types`: i24 keys have 24 bits, and a row of q8_0 is
followed by its scales.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from phicore.backend import cache_types

Array = Any

CACHE_DTYPES = {
    "f32": np.float32,
    "f16": np.float16,
    "i16": np.int16,
    "i24": np.int8,
    "q8_0": np.int8,
}
"""The dtypes of cached rows, by row type."""


def zeros(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that no other array shares and JAX need not copy: memory that is aligned."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def as_stored(x: Array, row_type: str) -> list[Array]:
    """Rows (..., D) as a cache holds them: numbers, and the scales of those that have some."""
    if row_type == "i24":
        multiples, scales = cache_types.multiples(jnp, x, 32767 * 256)
        integers = multiples.astype(jnp.int32)
        high = ((integers + 128) >> 8).astype(jnp.int16)
        return [jnp.concatenate([as_bytes(high), integers.astype(jnp.int8)], axis=-1), scales]
    rows, scales = cache_types.stored_rows(jnp, x, row_type)
    if row_type == "q8_0":  # the scales of a row are behind it
        return [jnp.concatenate([rows, as_bytes(scales)], axis=-1)]
    return [rows] if scales is None else [rows, scales]


def as_numbers(rows: Array, scales: Array | None) -> Array:
    """The reverse: (..., D) float32."""
    if rows.dtype == jnp.int8 and scales is None:
        dim = rows.shape[-1] * cache_types.BLOCK // (cache_types.BLOCK + 2)
        rows, scales = rows[..., :dim], from_bytes(rows[..., dim:], jnp.float16)
    elif rows.dtype == jnp.int8:
        dim = rows.shape[-1] // 3
        high = from_bytes(rows[..., : 2 * dim], jnp.int16).astype(jnp.int32)
        rows = (high << 8) + rows[..., 2 * dim :].astype(jnp.int32)
    return cache_types.numbers_of_rows(jnp, rows, scales)


def as_bytes(x: Array) -> Array:
    """Numbers of 16 bits (..., N) as their bytes (..., 2 N)."""
    return lax.bitcast_convert_type(x, jnp.int8).reshape(*x.shape[:-1], -1)


def from_bytes(x: Array, dtype: Any) -> Array:
    """The reverse."""
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), dtype)


def put(old: Array, new: Array, start: Array) -> Array:
    """Write new positions (B, K, T, ...) into a cache (B, K, S, ...), from `start` (B,) on."""

    def put_one(old: Array, new: Array, position: Array) -> Array:
        return lax.dynamic_update_slice(old, new, (0, position, *(0,) * (old.ndim - 2)))

    if start.shape[0] == 1:  # under vmap it would become a scatter, which XLA:CPU does by loops
        return put_one(old[0], new[0], start[0])[None]
    return jax.vmap(put_one)(old, new, start)
