"""Quantized matrices in plain XLA: packed codes and scales, expanded inside the product.

Every affine type has one of two layouts: codes of up to 4 bits are nibbles, wider codes are int8.
Types without an affine form are dense float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import floor, log2
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from phicore.gguf.matrix import Matrix
from phicore.gguf.quants import affine, is_affine
from phicore_jax.experts import products_by_tiles

Array = Any

FEW_ROWS = 8
"""Up to this number of rows, each is multiplied by its expert's matrix on its own."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "biases"],
    meta_fields=["offset", "largest_code"],
)
@dataclass(frozen=True)
class Quantized:
    """N rows of K values: scale * (code - offset) + bias, in G groups a row.

    Attributes:
        codes: (N, G, K / G) int8, code - offset, with the attribute `offset` 0; or
            (N, G, K / G / 2) uint8, where the low nibble of byte i of a group is code i and the
            high nibble is code i + K / G / 2.
        scales: (N, G) float32.
        biases: (N, G) float32 or None.
        offset: The number that is subtracted from every code.
        largest_code: An upper bound of the absolute value of code - offset.
    """

    codes: Array
    scales: Array
    biases: Array | None
    offset: int
    largest_code: int

    @property
    def is_nibbles(self) -> bool:
        return self.codes.dtype == jnp.uint8

    def integer_planes(self) -> list[Array]:
        """Return code - offset as arrays (N, G, n) int32.

        Nibbles give two arrays, the first and second half of each group; int8 codes give one.
        """
        codes = [self.codes & 15, self.codes >> 4] if self.is_nibbles else [self.codes]
        return [c.astype(jnp.int32) - self.offset for c in codes]

    def dense(self) -> Array:
        """Expand the matrix to (N, K) float32."""
        codes = jnp.concatenate(self.integer_planes(), axis=2).astype(jnp.float32)
        values = self.scales[:, :, None] * codes
        if self.biases is not None:
            values = values + self.biases[:, :, None]
        return values.reshape(self.codes.shape[0], -1)


def pack(matrix: Matrix) -> tuple[Any, ...]:
    """Pack a matrix into parts, stacked along the rows: `Quantized` or dense (N, K) host arrays."""
    packed = [_pack_part(part) for part in matrix.parts]
    return tuple(_join(list(alike)) for _, alike in groupby(packed, key=_layout))


def pack_experts(matrices: Sequence[Matrix]) -> tuple[Any, ...]:
    """Pack X experts' matrices of equal types, as `pack` does, with an axis of X in front."""
    packed = [pack(matrix) for matrix in matrices]
    return tuple(
        jax.tree.map(lambda *arrays: np.stack(arrays), *parts)
        for parts in zip(*packed, strict=True)
    )


def _pack_part(part: Any) -> Any:
    if not is_affine(part.type):
        return part.dequantize()
    a = affine(part.type, part.data)
    largest = max(a.offset, 2**a.bits - 1 - a.offset)
    codes = a.codes.reshape(*a.scales.shape, a.group_size)
    if a.bits > 4:
        signed = (codes.astype(np.int16) - a.offset).astype(np.int8)
        return Quantized(signed, a.scales, a.biases, 0, largest)
    half = a.group_size // 2
    nibbles = codes[..., :half] | codes[..., half:] << 4
    return Quantized(nibbles, a.scales, a.biases, a.offset, largest)


def _layout(part: Any) -> tuple[Any, ...]:
    """Return a key; consecutive parts with equal keys can be joined."""
    if isinstance(part, np.ndarray):
        return (np.ndarray,)
    return (
        part.codes.dtype,
        part.codes.shape[1:],
        part.biases is None,
        part.offset,
        part.largest_code,
    )


def _join(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def product(x: Array, part: Any) -> Array:
    """Multiply x (M, K) by one part of N rows: (M, N)."""
    if not isinstance(part, Quantized):
        return x @ part.T
    return _matvec(x, part) if x.shape[0] == 1 else x @ part.dense().T


def expert_product(x: Array, experts: Array, part: Any) -> Array:
    """Multiply each row of x (M, K) by the matrix of its expert, int32 (M,): (M, N).

    A few rows are multiplied one by one. Many rows are grouped into tiles of rows of one expert,
    and the expert's matrix is expanded for each tile.
    """

    def matrix(number: Array) -> Any:
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, number, keepdims=False), part)

    m, count = x.shape[0], jax.tree.leaves(part)[0].shape[0]
    if m <= FEW_ROWS:
        return jnp.concatenate([product(x[i : i + 1], matrix(experts[i])) for i in range(m)])
    rows = jax.tree.leaves(part)[0].shape[1]
    return products_by_tiles(x, experts, count, rows, lambda some, n: product(some, matrix(n)))


def _matvec(x: Array, w: Quantized) -> Array:
    """Multiply x (1, K) by one part of N rows, with sums of integers: (1, N).

    The codes are integers, so the activations are rounded to integers too. Within a group they are
    multiples of 1 / 2**b of the largest absolute value. The number of bits b is the largest for
    which the sum of a group's products fits into 32 bits: 18 (Q8_0) to 24, where float32 has 24.

    The sums are exact. The result is within 2e-7 of float64 for 4-bit codes and within 2e-6 for
    Q8_0; a float32 product is within 3e-7. On a CPU this is 3 times as fast as float32, because
    XLA vectorizes sums of integers but not of floats, whose order it must keep, and because no
    expanded weights are written to memory.
    """
    groups, group_size = w.scales.shape[1], x.shape[1] // w.scales.shape[1]
    steps = 2.0 ** floor(log2((2**31 - 1) / (w.largest_code * group_size)))
    x = x.reshape(1, groups, group_size)
    largest = jnp.max(jnp.abs(x), axis=2)  # (1, G)
    # A NaN or an infinity would be lost in an integer, so the unit of its group keeps it.
    unit = jnp.where(largest <= 1e-30, 1, largest) / steps
    integers = jnp.round(x / unit[:, :, None]).astype(jnp.int32)
    # Without the barriers, XLA would compute the integers again for every row.
    integers, unit, sums = lax.optimization_barrier((integers, unit, x.sum(axis=2)))
    planes = w.integer_planes()
    integers = jnp.split(integers, len(planes), axis=2)
    terms = [plane * xs for plane, xs in zip(planes, integers, strict=True)]
    products = lax.optimization_barrier(sum(terms).sum(axis=2))  # (N, G) int32
    values = products.astype(jnp.float32) * (w.scales * unit)
    if w.biases is not None:
        values = values + w.biases * sums
    return lax.optimization_barrier(values.sum(axis=1)[None])


def rows(index: Array, part: Any) -> Array:
    """Expand the rows `index` (n,) of a part: (n, K) float32."""
    picked = jax.tree.map(lambda a: a[index], part)
    return picked.dense() if isinstance(picked, Quantized) else picked
