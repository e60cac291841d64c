"""The GPU kernels as functions of JAX arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Type
from jax import lax

from phicore.backend.philox import NUMBERS
from phicore.gguf.reader import GGUFTensor
from phicore_jax.cuda import attention, uniforms
from phicore_jax.cuda.attention import Shape
from phicore_jax.cuda.formats import FORMATS, GROUP
from phicore_jax.cuda.linear import (
    emit_expand,
    emit_expert_expand,
    emit_expert_product,
    emit_product,
    emit_quantize,
    emit_quantize_gated,
    emit_quantize_normed,
    integers,
    warps_of,
)
from phicore_jax.cuda.ptx import launch, launch_in_place
from phicore_jax.cuda.uniforms import blocks_of, emit_uniforms
from phicore_jax.cuda.warp import LANES
from phicore_jax.experts import products_by_tiles
from phicore_jax.own import OwnKernels, Source

Array = Any

FEW_ROWS = 8
"""Largest number of activation rows for the kernels; XLA multiplies more, by expanded weights."""
EXPANDED_BYTES = 64 << 20
"""Size of the part of a matrix that is expanded at a time, in bytes of expanded weights."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["planes"],
    meta_fields=["type", "columns", "count"],
)
@dataclass(frozen=True)
class Planes:
    """A packed matrix of N rows by K columns, or several such matrices stacked along the rows.

    Attributes:
        planes: The arrays of the type's `Format.planes`; their first axis is the rows.
        type: The quantization type.
        columns: K.
        count: The number of matrices.
    """

    planes: tuple[Array, ...]
    type: Type
    columns: int
    count: int = 1

    @property
    def rows(self) -> int:
        """N, the number of rows of one matrix."""
        return int(self.planes[0].shape[0]) // self.count

    def dense(self) -> Array:
        """Expand all matrices to (count * N, K) float32."""
        return FORMATS[self.type].dense(self.planes)


@dataclass(frozen=True)
class Integers:
    """A few rows of activations (M, K), quantized by `emit_quantize`.

    Attributes:
        rows: M.
        arrays: The bytes, units and sums of all groups.
    """

    rows: int
    arrays: tuple[Array, ...]


class CudaKernels(OwnKernels):
    """The GPU kernels. The counterpart for CPUs is `kernels.runtime.Kernels`."""

    packed = Planes
    cache_type = "i16"
    has_fast_products = True
    has_uniforms = True

    def has_type(self, ggml_type: Type) -> bool:
        return ggml_type in FORMATS

    def has_experts(self, ggml_type: Type) -> bool:
        return ggml_type in FORMATS

    def has_cache(self, cache_type: str, tokens: int, dim: int) -> bool:
        return tokens == 1 and cache_type in attention.CACHE_TYPES and attention.has_dim(dim)

    def pack(self, tensors: Sequence[GGUFTensor], count: int = 1) -> Planes:
        data = [tensor.data for tensor in tensors]
        together = np.asarray(data[0]) if len(data) == 1 else np.concatenate(data)
        planes = _planes(tensors[0].type, together)
        return Planes(planes, tensors[0].type, tensors[0].shape[1], count)

    def prepared(self, x: Array, source: Source | None) -> Integers | Array:
        if x.shape[0] > FEW_ROWS or x.shape[1] % GROUP:
            return x
        return Integers(x.shape[0], quantize(x, source))

    def linear(
        self, x: Any, w: Planes, experts: Array | None = None, *, is_fast: bool = False
    ) -> Array:
        if not isinstance(x, Integers):
            if experts is None:
                return product_of_many(x, w, is_fast=is_fast)
            return products_by_tiles(
                x,
                experts,
                w.count,
                w.rows,
                lambda some, number: product_of_many(some, w, number, is_fast=is_fast),
            )
        m = x.rows
        constants = (FORMATS[w.type], (w.rows, w.columns), m)
        result = jax.ShapeDtypeStruct((m, w.rows), jnp.float32)
        operands = (*x.arrays, *w.planes)
        if experts is None:
            (y,) = launch(emit_product, constants, operands, (result,), warps_of(w.rows, m))
        else:
            operands, warps = (experts, *operands), m * warps_of(w.rows, 1)
            (y,) = launch(emit_expert_product, constants, operands, (result,), warps)
        return y

    def rows(self, index: Array, w: Planes) -> Array:
        return Planes(tuple(plane[index] for plane in w.planes), w.type, w.columns).dense()

    def uniforms(self, key: Array, step: Array, size: int) -> Array:
        rows, blocks = key.shape[0], blocks_of(size)
        result = jax.ShapeDtypeStruct((rows, blocks * NUMBERS), jnp.float32)
        operands, warps = (key, step), uniforms.warps_of(rows, size)
        (found,) = launch(emit_uniforms, (rows, size), operands, (result,), warps)
        return found[:, :size]

    def store(
        self, k: Array, v: Array, positions: Array, cache_type: str, cache: Sequence[Array]
    ) -> list[Array]:
        batch, kv_heads, _, dim = k.shape
        shape = Shape(batch, kv_heads, kv_heads, cache[0].shape[2], dim, cache_type)
        operands, warps = (k, v, positions), 2 * batch * kv_heads
        return list(launch_in_place(attention.emit_store, (shape,), operands, cache, warps))

    def attention(
        self,
        q: Array,
        positions: Array,
        window: int | None,
        cache_type: str,
        keys: Array,
        values: Array,
        *scales: Array,
    ) -> Array:
        batch, heads, _, dim = q.shape
        shape = Shape(batch, heads, keys.shape[1], keys.shape[2], dim, cache_type)
        cache = (keys, scales[0], values, scales[1]) if scales else (keys, values)
        parts = [
            jax.ShapeDtypeStruct((batch, heads, shape.splits, n), jnp.float32) for n in (dim, 2)
        ]
        warps = batch * heads * shape.splits
        found = launch(
            attention.emit_attention, (shape, window), (q, positions, *cache), parts, warps
        )
        result = jax.ShapeDtypeStruct(q.shape, jnp.float32)
        (y,) = launch(attention.emit_combine, (shape,), found, (result,), shape.combining_warps)
        return y


@partial(jax.jit, static_argnums=0)
def _planes(ggml_type: Type, data: Array) -> tuple[Array, ...]:
    return FORMATS[ggml_type].planes(data)


def product_of_many(x: Array, w: Planes, number: Array | None = None, *, is_fast: bool) -> Array:
    """Multiply x (M, K) by a matrix (N, K), expanded part by part to 16-bit floats: (M, N).

    Args:
        number: The number of the matrix, an int32, if `w` holds several.
        is_fast: Use float16, which is faster and less exact than two bfloat16 a number.
    """
    if is_fast:
        largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
        unit = jnp.where(largest > 0, largest, 1)
        left, dtype = (x / unit).astype(jnp.float16), jnp.float16
    else:
        # XLA may remove a conversion to bfloat16 and back, but not reduce_precision.
        nearest = lax.reduce_precision(x, 8, 7)
        rest = x - nearest
        left = jnp.concatenate([nearest, nearest, rest], axis=1).astype(jnp.bfloat16)
        dtype = jnp.bfloat16
    width = left.shape[1]
    most = max(256, EXPANDED_BYTES // (2 * width) // 256 * 256)
    found: list[Array] = []
    planes = w.planes
    for start in range(0, w.rows, most):
        count = min(most, w.rows - start)
        if found:  # keep the parts in order, so that one is in memory at a time
            left, planes, found[-1] = lax.optimization_barrier((left, planes, found[-1]))
        result = jax.ShapeDtypeStruct((count, width), dtype)
        warps = -(-count * w.columns // (GROUP * LANES))
        rest = ((start, count), is_fast)
        constants: tuple[Any, ...]
        if number is None:
            constants = (FORMATS[w.type], w.columns, *rest)
            (part,) = launch(emit_expand, constants, planes, (result,), warps)
        else:
            constants = (FORMATS[w.type], (w.rows, w.columns), *rest)
            operands = (number.reshape(1), *planes)
            (part,) = launch(emit_expert_expand, constants, operands, (result,), warps)
        sums = (((1,), (1,)), ((), ()))
        found.append(lax.dot_general(left, part, sums, preferred_element_type=jnp.float32))
    y = found[0] if len(found) == 1 else jnp.concatenate(found, axis=1)
    return y * unit if is_fast else y


def quantize(x: Array, source: Source | None = None) -> tuple[Array, ...]:
    """Quantize activations (M, K) to integers; see `emit_quantize` for the results.

    With a source, the kernel computes the activations from it and does not read x.
    """
    groups, columns = x.size // GROUP, x.shape[1]
    results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in integers(groups)]
    if source is None:
        return launch(emit_quantize, (groups,), (x,), results, groups)
    if source.name == "rms_norm":
        constants = (groups, columns, source.eps)
        return launch(emit_quantize_normed, constants, source.arrays, results, groups)
    return launch(emit_quantize_gated, (groups, columns), source.arrays, results, groups)
