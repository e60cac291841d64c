"""The cache of keys and values in plain XLA: formats of stored rows, and writing them in place.

Two types differ from `phicore.backend.cache_types`. The type i24 stores keys in 24 bits and values
in 16. A row of q8_0 holds its scales too, after its numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from phicore.backend import cache_types
from phicore.backend.cache_types import CacheType

Array = Any

FORMS = 64
"""For so many forms of caches, compiled functions that make or copy them are held. Each takes some
1.5 MB."""
I24 = CacheType(
    "i24",
    "int8",
    24,
    rounding=2.0**-24,
    error=4e-5,  # mostly from the values, which have 16 bits
    scale_dtype="float32",
    largest=32767 * 256,
)
ROW_TYPES = {
    **{name: cache_types.TYPES[name] for name in cache_types.available(jnp, "f32")},
    I24.name: I24,
}
"""Row formats by name; XLA stores all of them.

A row of i24 is the upper 16 bits of all its numbers, then the lower 8.
"""


def names(default: str) -> tuple[str, ...]:
    """Return the names of all cache types, the default type first."""
    return tuple(dict.fromkeys([default, *ROW_TYPES]))


def rows_of_cache(cache_type: str) -> tuple[CacheType, CacheType]:
    """Return the row formats of the keys and of the values of a cache type.

    With i24 the values have 16 bits, since their rounding matters less.
    """
    keys = ROW_TYPES[cache_type]
    return keys, ROW_TYPES["i16"] if keys is I24 else keys


def width(row_type: CacheType, dim: int) -> int:
    """Return the length of a stored row of `dim` channels, in numbers of its dtype.

    A row of q8_0 includes its scales.
    """
    if row_type.group is not None:
        row_type.check(dim)
        return row_type.bytes_of_row(dim)
    return dim * row_type.bits // 8 // np.dtype(row_type.dtype).itemsize


def as_stored(x: Array, row_type: CacheType) -> list[Array]:
    """Convert rows (..., D) to the arrays of a cache: stored rows, and scales if kept apart."""
    if row_type is I24:
        multiples, scales = cache_types.multiples(jnp, x, I24)
        integers = multiples.astype(jnp.int32)
        high = ((integers + 128) >> 8).astype(jnp.int16)
        return [jnp.concatenate([as_bytes(high), integers.astype(jnp.int8)], axis=-1), scales]
    rows, scales = cache_types.stored_rows(jnp, x, row_type.name)
    if scales is None:
        return [rows]
    if row_type.group is not None:  # the scales follow the numbers in the row
        return [jnp.concatenate([rows, as_bytes(scales)], axis=-1)]
    return [rows, scales]


def as_numbers(rows: Array, scales: Array | None, row_type: CacheType) -> Array:
    """Convert the stored rows and scales of `as_stored` back to (..., D) float32."""
    if row_type.group is not None:  # the scales follow the numbers in the row
        dim = rows.shape[-1] * row_type.group // (row_type.group + 2)
        rows, scales = rows[..., :dim], from_bytes(rows[..., dim:], jnp.float16)
    elif row_type is I24:
        dim = rows.shape[-1] // 3
        high = from_bytes(rows[..., : 2 * dim], jnp.int16).astype(jnp.int32)
        rows = (high << 8) + rows[..., 2 * dim :].astype(jnp.int32)
    return cache_types.numbers_of_rows(jnp, rows, scales)


def as_bytes(x: Array) -> Array:
    """Reinterpret 16-bit numbers (..., N) as int8 (..., 2 N)."""
    return lax.bitcast_convert_type(x, jnp.int8).reshape(*x.shape[:-1], -1)


def from_bytes(x: Array, dtype: Any) -> Array:
    """Reinterpret int8 (..., 2 N) as numbers (..., N) of a 16-bit dtype."""
    return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, 2), dtype)


@lru_cache(FORMS)
def zeros(forms: tuple[jax.ShapeDtypeStruct, ...], sharding: Any) -> Callable[[], list[Array]]:
    """Return a compiled function that makes arrays of zeros.

    One call makes all arrays of a layer, since the host needs up to a millisecond for each call of
    `jnp.zeros`.
    """
    return jax.jit(lambda: [jnp.zeros(f.shape, f.dtype) for f in forms], out_shardings=sharding)


def put(old: Array, new: Array, start: Array) -> Array:
    """Write new rows (B, K, T, ...) into a cache (B, K, S, ...), from slots `start` (B,) on."""

    def put_one(old: Array, new: Array, position: Array) -> Array:
        return lax.dynamic_update_slice(old, new, (0, position, *(0,) * (old.ndim - 2)))

    if start.shape[0] == 1:  # vmap would make it a scatter, a slow loop in XLA:CPU
        return put_one(old[0], new[0], start[0])[None]
    return jax.vmap(put_one)(old, new, start)
