"""Quantized matrices on JAX: packed codes and scales, expanded inside the product.

Two layouts hold every affine type: codes of up to 4 bits as nibbles, wider ones as int8. Types
without an affine form are dense float32. This is the seam for faster kernels: whatever they want of
a matrix is made in `pack` and used in `linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phicore.gguf.matrix import Matrix
from phicore.gguf.quants import affine, is_affine

Array = Any


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "biases"],
    meta_fields=["offset"],
)
@dataclass(frozen=True)
class Quantized:
    """N rows of K values: scale * (code - offset) + bias in G groups a row.

    Attributes:
        codes: (N, G, K / G) int8 holding code - offset (then `offset` is 0), or (N, G, K / G / 2)
            uint8, where byte i of a group holds code i below and code i + K / G / 2 above.
        scales: (N, G) float32.
        biases: (N, G) float32 or None.
    """

    codes: Array
    scales: Array
    biases: Array | None
    offset: int

    def planes(self) -> list[Array]:
        """The values without biases, as the halves of each group: (N, G, n) float32 each."""
        is_whole = self.codes.dtype == jnp.int8
        codes = [self.codes] if is_whole else [self.codes & 15, self.codes >> 4]
        scales = self.scales[..., None]
        return [scales * (c.astype(jnp.float32) - self.offset) for c in codes]

    def dense(self) -> Array:
        """The values, (N, K) float32."""
        values = jnp.concatenate(self.planes(), axis=-1)
        if self.biases is not None:
            values = values + self.biases[..., None]
        return values.reshape(self.codes.shape[0], -1)


def pack(matrix: Matrix) -> tuple[Any, ...]:
    """Host arrays of a matrix: parts that lie on top of each other, `Quantized` or dense (N, K)."""
    packed = [_pack_part(part) for part in matrix.parts]
    return tuple(_join(list(alike)) for _, alike in groupby(packed, key=_layout))


def _pack_part(part: Any) -> Any:
    if not is_affine(part.type):
        return part.dequantize()
    a = affine(part.type, part.data)
    codes = a.codes.reshape(*a.scales.shape, a.group_size)
    if a.bits > 4:
        signed = (codes.astype(np.int16) - a.offset).astype(np.int8)
        return Quantized(signed, a.scales, a.biases, 0)
    half = a.group_size // 2
    return Quantized(codes[..., :half] | codes[..., half:] << 4, a.scales, a.biases, a.offset)


def _layout(part: Any) -> tuple[Any, ...]:
    """Parts of the same layout can be joined."""
    if isinstance(part, np.ndarray):
        return (np.ndarray,)
    return part.codes.dtype, part.codes.shape[1:], part.biases is None, part.offset


def _join(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def linear(x: Array, weight: tuple[Any, ...] | Array) -> Array:
    """x @ weight.T for (..., K) float32."""
    flat = x.reshape(-1, x.shape[-1])  # (M, K)
    y = jnp.concatenate([_product(flat, part) for part in weight], axis=-1)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _product(x: Array, part: Any) -> Array:
    """(M, K) by one part of N rows: (M, N)."""
    if not isinstance(part, Quantized):
        return x @ part.T
    m, groups = x.shape[0], part.scales.shape[1]
    planes = part.planes()
    x = x.reshape(m, groups, len(planes), -1)
    cuts = _cuts(x) if m == 1 else [slice(None)]
    y = sum(_dot(x[:, cut, i], plane[:, cut]) for cut in cuts for i, plane in enumerate(planes))
    if part.biases is not None:
        y = y + _dot(x.sum(axis=(2, 3)), part.biases)
    return y


def _dot(x: Array, w: Array) -> Array:
    """x @ w.T over all axes but the first; between barriers, or XLA:CPU would not fuse it.

    A product of one row is a single loop over codes and scales (3-5 times as fast as first writing
    the values out) if nothing else can be fused into either end of it.
    """
    x, w = x.reshape(x.shape[0], -1), w.reshape(w.shape[0], -1)
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(x) @ w.T)


def _cuts(x: Array) -> list[slice]:
    """Slices of the groups of (1, G, planes, n), each below XLA:CPU's limit for that fusion.

    Source: xla/service/cpu/cpu_instruction_fusion.cc, `kFusionThresholdBytes`: the vector of a
    matrix-vector product must take less than 16 KiB.
    """
    groups, per_group = x.shape[1], x.shape[3]
    count = -(-groups * per_group * 4 // (2**14 - 4))
    size = -(-groups // count)
    return [slice(start, start + size) for start in range(0, groups, size)]


def rows(ids: Array, weight: tuple[Any, ...] | Array) -> Array:
    """Rows of a matrix, expanded: int (B, T) gives (B, T, K)."""
    flat = ids.reshape(-1)
    start = 0
    values: Array = None
    for part in weight if isinstance(weight, tuple) else (weight,):
        count = jax.tree.leaves(part)[0].shape[0]
        index = jnp.clip(flat - start, 0, count - 1)
        picked = jax.tree.map(lambda a, index=index: a[index], part)
        found = picked.dense() if isinstance(picked, Quantized) else picked
        values = found if values is None else jnp.where((flat >= start)[:, None], found, values)
        start += count
    return values.reshape(*ids.shape, -1)
