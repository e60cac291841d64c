"""How keys and values are stored: the types of a cache, and what each rounds.

A row is the D numbers of a head at a position.

| type | a row | rounded by at most |
| --- | --- | --- |
| `f32` | float32 | nothing |
| `f16`, `bf16` | floats of 16 bits | 2**-11, 2**-8 of each number |
| `i16` | int16, and a float32 scale | 2**-16 of the row's largest |
| `q8_0` | int8, and a float16 scale for each 32, in ggml's blocks | 1/250 of the 32's largest, |
|        | | or 2e-6 if that is more |

A layer's cache is `k` and `v`, rows (B, K, S, D), and with scales `k_scale` and `v_scale`.
"""

from __future__ import annotations

from typing import Any

from phicore.errors import BackendError

Array = Any
Cache = dict[str, Array]

FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
"""The types that are plain numbers, and the names of their dtypes."""
BLOCK = 32  # numbers of `q8_0` that share a scale


def empty(xp: Any, cache_type: str, shape: tuple[int, int, int, int]) -> Cache:
    """Zeros, for keys and values (B, K, S, D).

    Raises:
        BackendError: For `q8_0` and rows that are no blocks of 32.
    """

    def zeros(shape: tuple[int, ...], name: str) -> Array:
        return xp.zeros(shape, dtype=getattr(xp, name))

    cache: Cache = {}
    for name in ("k", "v"):
        if cache_type in FLOATS:
            cache[name] = zeros(shape, FLOATS[cache_type])
        elif cache_type == "i16":
            cache[name], cache[f"{name}_scale"] = zeros(shape, "int16"), zeros(shape[:3], "float32")
        else:
            check_blocks(shape[3])
            scales = (*shape[:3], shape[3] // BLOCK)
            cache[name], cache[f"{name}_scale"] = zeros(shape, "int8"), zeros(scales, "float16")
    return cache


def check_blocks(dim: int) -> None:
    """Refuse heads that `q8_0` cannot hold."""
    if dim % BLOCK:
        raise BackendError(
            f"cache type q8_0: this model's heads have {dim} channels, which are no blocks of "
            f"{BLOCK}; take i16 or f16"
        )


def stored(xp: Any, k: Array, v: Array, cache_type: str) -> Cache:
    """Keys and values (B, K, T, D) float32 as a cache holds them."""
    cache: Cache = {}
    for name, x in (("k", k), ("v", v)):
        cache[name], scales = stored_rows(xp, x, cache_type)
        if scales is not None:
            cache[f"{name}_scale"] = scales
    return cache


def numbers(xp: Any, cache: Cache) -> tuple[Array, Array]:
    """What a cache stands for: keys and values (B, K, S, D) float32."""
    k, v = (numbers_of_rows(xp, cache[n], cache.get(f"{n}_scale")) for n in ("k", "v"))
    return k, v


def stored_rows(xp: Any, x: Array, row_type: str) -> tuple[Array, Array | None]:
    """Rows (..., D) float32 as numbers or integers, and the scales of these."""
    if row_type in FLOATS:
        return xp.astype(x, getattr(xp, FLOATS[row_type])), None
    if row_type == "i16":
        integers, scales = multiples(xp, x, 32767)
        return xp.astype(integers, xp.int16), scales
    blocks = xp.reshape(x, (*x.shape[:-1], -1, BLOCK))
    integers, scales = multiples(xp, blocks, 127, xp.float16)
    return xp.astype(xp.reshape(integers, x.shape), xp.int8), xp.astype(scales, xp.float16)


def numbers_of_rows(xp: Any, rows: Array, scales: Array | None) -> Array:
    """What rows (..., D) stand for, float32."""
    rows = xp.astype(rows, xp.float32)
    if scales is None:
        return rows
    scales = xp.expand_dims(xp.astype(scales, xp.float32), axis=-1)
    if len(scales.shape) == len(rows.shape):
        return rows * scales
    blocks = xp.reshape(rows, (*rows.shape[:-1], -1, BLOCK))
    return xp.reshape(blocks * scales, rows.shape)


def multiples(xp: Any, x: Array, most: int, dtype: Any = None) -> tuple[Array, Array]:
    """Numbers (..., N) as integers up to `most` times a scale (...,), which is rounded to `dtype`.

    What is not finite makes the scale NaN.
    """
    # the sum is 0 or NaN: the maximum of some libraries is blind to NaN
    scale = xp.max(xp.abs(x), axis=-1) / most + xp.sum(0 * x, axis=-1)
    if dtype is not None:
        scale = xp.astype(xp.astype(scale, dtype), xp.float32)
    divisor = xp.expand_dims(scale, axis=-1)
    integers = xp.round(x / xp.where(divisor > 0, divisor, 1.0))
    # a scale that was rounded down a lot, a tiny one, leaves more than fits
    integers = xp.where(integers > most, float(most), integers)
    integers = xp.where(integers < -most, -float(most), integers)
    return xp.where(divisor > 0, integers, 0.0), scale
