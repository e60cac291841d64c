"""MLX's functions under the names and with the meanings of the Python Array API standard."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.core import (
    abs,
    arange,
    bfloat16,
    broadcast_to,
    concat,
    exp,
    expand_dims,
    float16,
    float32,
    int8,
    int16,
    int32,
    log,
    log1p,
    matmul,
    max,
    maximum,
    mean,
    permute_dims,
    reshape,
    round,
    sqrt,
    take,
    take_along_axis,
    uint32,
    where,
    zeros,
)

bool = mx.bool_

__all__ = [
    "abs",
    "arange",
    "argmax",
    "astype",
    "bfloat16",
    "bool",
    "broadcast_to",
    "concat",
    "exp",
    "expand_dims",
    "float16",
    "float32",
    "int8",
    "int16",
    "int32",
    "log",
    "log1p",
    "matmul",
    "max",
    "maximum",
    "mean",
    "permute_dims",
    "reshape",
    "round",
    "sqrt",
    "sum",
    "take",
    "take_along_axis",
    "uint32",
    "where",
    "zeros",
]


def argmax(x: Any, /, *, axis: int | None = None, keepdims: Any = False) -> Any:
    return mx.argmax(x, axis=axis, keepdims=keepdims).astype(mx.int32)


def astype(x: Any, dtype: Any, /) -> Any:
    return x.astype(dtype)


def sum(x: Any, /, *, axis: int | None = None, dtype: Any = None, keepdims: Any = False) -> Any:
    return mx.sum(x if dtype is None else x.astype(dtype), axis=axis, keepdims=keepdims)
