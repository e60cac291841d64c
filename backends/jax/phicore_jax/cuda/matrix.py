"""Quantized matrices in a card's memory, and what is computed with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Type

from phicore.gguf.reader import GGUFTensor
from phicore_jax.cuda.formats import FORMATS
from phicore_jax.cuda.linear import emit_product, quantize, rows_of_warp
from phicore_jax.cuda.ptx import WARPS_OF_BLOCK, ptx
from phicore_jax.cuda.warp import LANES

Array = Any

FEW_ROWS = 8
"""Up to how many rows are multiplied by the kernel; more by XLA, with expanded weights."""


@partial(jax.tree_util.register_dataclass, data_fields=["planes"], meta_fields=["type", "columns"])
@dataclass(frozen=True)
class Planes:
    """N rows of K values, as `formats` says.

    Attributes:
        planes: Arrays whose first axis is N.
        type: Of ggml.
        columns: K.
    """

    planes: tuple[Array, ...]
    type: Type
    columns: int

    @property
    def rows(self) -> int:
        return int(self.planes[0].shape[0])

    def dense(self) -> Array:
        """The values, (N, K) float32."""
        return FORMATS[self.type].dense(self.planes)


def has_type(ggml_type: Type) -> bool:
    return ggml_type in FORMATS


def pack(tensors: Sequence[GGUFTensor]) -> Planes:
    """Host arrays of tensors of one type that lie on top of each other."""
    fmt = FORMATS[tensors[0].type]
    parts = [fmt.planes(tensor.data) for tensor in tensors]
    planes = tuple(np.concatenate(plane) for plane in zip(*parts, strict=True))
    return Planes(planes, fmt.type, tensors[0].shape[1])


def product(x: Array, w: Planes) -> Array:
    """(M, K) by N rows: (M, N)."""
    if x.shape[0] > FEW_ROWS:
        return x @ w.dense().T
    m, shape = x.shape[0], (w.rows, w.columns)
    blocks = -(-w.rows // (rows_of_warp(m) * WARPS_OF_BLOCK))
    call = jax.ffi.ffi_call("__gpu$xla.gpu.ptx", jax.ShapeDtypeStruct((m, w.rows), jnp.float32))
    return call(
        *quantize(x),
        *w.planes,
        name="product",
        kernel_type="ptx",
        kernel_data=_product_ptx(w.type, shape, m),
        **_sizes("grid", blocks),
        **_sizes("block", WARPS_OF_BLOCK * LANES),
        shared_mem_bytes=np.int32(0),
    )


def _sizes(what: str, x: int) -> dict[str, np.int32]:
    return {f"{what}_{axis}": np.int32(x if axis == "x" else 1) for axis in "xyz"}


@cache
def _product_ptx(ggml_type: Type, shape: tuple[int, int], m: int) -> str:
    fmt = FORMATS[ggml_type]
    arguments = 3 + fmt.plane_count + 1
    return ptx("product", arguments, lambda w, args: emit_product(w, fmt, shape, m, args))


def rows(index: Array, w: Planes) -> Array:
    """Rows of a matrix, expanded: (n,) below N gives (n, K)."""
    return Planes(tuple(plane[index] for plane in w.planes), w.type, w.columns).dense()
