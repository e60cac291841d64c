"""Cache types: the formats in which a cache stores keys and values.

A row is the D numbers of a head at a position. It is stored as floats, or as integers that are
multiples of a scale. A scale belongs to a whole row, or to a group of its numbers (`q8_0` has
ggml's blocks of 32). A layer's cache has the arrays `k` and `v`, rows (B, K, S, D). Types with
scales add `k_scale` and `v_scale`.

To add a type, add an entry to `TYPES`; this is enough if `xp` has the dtypes of its numbers and
scales. A backend lists the types that it supports, and may add types of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from phicore.errors import BackendError

Array = Any
Cache = dict[str, Array]


@dataclass(frozen=True)
class CacheType:
    """A format for the rows of a cache.

    Attributes:
        dtype: The name of the dtype of a cache's rows.
        bits: Bits per number.
        rounding: The bound of the rounding error, relative to the number itself or, for types with
            scales, to the largest number that shares its scale.
        least: The absolute rounding error that is always allowed, however small the number.
        error: A bound of the relative error of attention on random numbers.
        scale_dtype: The name of the dtype of scales. None means floats without scales.
        largest: The largest integer that a scale is multiplied by.
        group: The number of values that share a scale. None means all values of a row.
    """

    name: str
    dtype: str
    bits: int
    rounding: float
    error: float
    least: float = 0.0
    scale_dtype: str | None = None
    largest: int = 0
    group: int | None = None

    def scale_shape(self, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales for rows (..., D)."""
        return rows[:-1] if self.group is None else (*rows[:-1], rows[-1] // self.group)

    def bytes_of_row(self, dim: int) -> int:
        """Return the bytes that a row of D numbers takes, scales included."""
        scales = 0
        if self.scale_dtype is not None:
            scales = np.dtype(self.scale_dtype).itemsize * (dim // self.group if self.group else 1)
        return dim * self.bits // 8 + scales

    def check(self, dim: int) -> None:
        """Check that the rows of a head of size `dim` divide into groups.

        Raises:
            BackendError: If `dim` is not a multiple of the group size.
        """
        if self.group is not None and dim % self.group:
            raise BackendError(
                f"cache type {self.name}: this model's heads have {dim} channels, which is "
                f"not a multiple of {self.group}; take i16 or f16"
            )


TYPES = {
    cache_type.name: cache_type
    for cache_type in (
        CacheType("f32", "float32", 32, rounding=0.0, error=5e-6),
        CacheType("f16", "float16", 16, rounding=2.0**-11, error=1e-3, least=2.0**-25),
        CacheType("bf16", "bfloat16", 16, rounding=2.0**-8, error=8e-3),
        CacheType(
            "i16",
            "int16",
            16,
            rounding=2.0**-16,
            error=1e-4,
            scale_dtype="float32",
            largest=32767,
        ),
        CacheType(
            "q8_0",
            "int8",
            8,
            rounding=1 / 250,
            error=1e-2,
            least=127 * 2.0**-25,  # float16 stores tiny scales with few bits
            scale_dtype="float16",
            largest=127,
            group=32,
        ),
    )
}
"""Every type that the protocol's defaults can store, if `xp` has its dtypes."""


def available(xp: Any, default: str, *more: str) -> tuple[str, ...]:
    """Return the names of the types whose dtypes `xp` and NumPy have, the default type first.

    Args:
        more: Types whose dtypes NumPy does not have, such as bf16. `Backend.to_numpy` must then
            convert them.
    """
    names = (
        name
        for name, kind in TYPES.items()
        if all(
            hasattr(library, dtype)
            for library in (xp, np)
            for dtype in (kind.dtype, kind.scale_dtype or kind.dtype)
        )
    )
    return tuple(dict.fromkeys([default, *more, *names]))


def empty(xp: Any, cache_type: str, shape: tuple[int, int, int, int]) -> Cache:
    """Make a cache of zeros for keys and values (B, K, S, D).

    Raises:
        BackendError: If the type cannot hold heads of this size.
    """
    kind, cache = TYPES[cache_type], Cache()
    kind.check(shape[3])
    for name in ("k", "v"):
        cache[name] = xp.zeros(shape, dtype=getattr(xp, kind.dtype))
        if kind.scale_dtype is not None:
            dtype = getattr(xp, kind.scale_dtype)
            cache[f"{name}_scale"] = xp.zeros(kind.scale_shape(shape), dtype=dtype)
    return cache


def stored(xp: Any, k: Array, v: Array, cache_type: str) -> Cache:
    """Convert keys and values (B, K, T, D) float32 to the arrays that a cache stores."""
    cache: Cache = {}
    for name, x in (("k", k), ("v", v)):
        cache[name], scales = stored_rows(xp, x, cache_type)
        if scales is not None:
            cache[f"{name}_scale"] = scales
    return cache


def numbers(xp: Any, cache: Cache) -> tuple[Array, Array]:
    """Expand a cache to keys and values (B, K, S, D) float32."""
    k, v = (numbers_of_rows(xp, cache[n], cache.get(f"{n}_scale")) for n in ("k", "v"))
    return k, v


def stored_rows(xp: Any, x: Array, row_type: str) -> tuple[Array, Array | None]:
    """Convert rows (..., D) float32 to the stored dtype.

    Returns:
        The rows as floats or integers, and their scales; None for a type without scales.
    """
    kind = TYPES[row_type]
    if kind.scale_dtype is None:
        return xp.astype(x, getattr(xp, kind.dtype)), None
    groups = x if kind.group is None else xp.reshape(x, (*x.shape[:-1], -1, kind.group))
    integers, scales = multiples(xp, groups, kind)
    return xp.astype(xp.reshape(integers, x.shape), getattr(xp, kind.dtype)), scales


def numbers_of_rows(xp: Any, rows: Array, scales: Array | None) -> Array:
    """Expand stored rows (..., D) to float32."""
    rows = xp.astype(rows, xp.float32)
    if scales is None:
        return rows
    scales = xp.expand_dims(xp.astype(scales, xp.float32), axis=-1)
    if len(scales.shape) == len(rows.shape):
        return rows * scales
    groups = xp.reshape(rows, (*scales.shape[:-1], -1))
    return xp.reshape(groups * scales, rows.shape)


def multiples(xp: Any, x: Array, kind: CacheType) -> tuple[Array, Array]:
    """Split numbers (..., N) that share a scale into integers and that scale (...,).

    If any of the numbers is not finite, their scale is NaN.
    """
    most, dtype = kind.largest, getattr(xp, kind.scale_dtype or "float32")
    # Some libraries ignore NaN in a maximum. The sum is 0, or NaN if a number is not finite.
    scales = xp.max(xp.abs(x), axis=-1) / most + xp.sum(0 * x, axis=-1)
    scales = xp.astype(scales, dtype)
    divisor = xp.expand_dims(xp.astype(scales, xp.float32), axis=-1)
    integers = xp.round(x / xp.where(divisor > 0, divisor, 1.0))
    # A tiny scale may have been rounded down a lot; the integers are then too large.
    integers = xp.where(integers > most, float(most), integers)
    integers = xp.where(integers < -most, -float(most), integers)
    return xp.where(divisor > 0, integers, 0.0), scales
