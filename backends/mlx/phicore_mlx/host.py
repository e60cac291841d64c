"""Operations that NumPy or several threads compute faster than MLX's CPU device.

MLX's wheel for Linux multiplies matrices with the reference BLAS, at 1 % of the speed of NumPy's
BLAS, and reads quantized matrices with one thread. So NumPy, which can read the memory of MLX's
arrays, computes the products and the attention of prompts. For few tokens the rows of a weight are
divided among MLX streams, each of which has a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from phicore.backend import Array, Backend, LayerCache
from phicore.backend.host import cpu_count
from phicore_mlx.affine import LAYOUTS, TILE_CODES, dequantized

ROWS = 8
"""Smallest number of activation rows for which NumPy is faster, although it expands the weights."""

SHARED_WEIGHTS = 1 << 18
"""Number of weights whose product takes longer than starting it on another thread."""


class NeedsHostError(Exception):
    """Raised when tracing needs values, because NumPy computes; the shape must run uncompiled."""


class _NumPy(Backend):
    """The protocol's default operations, on NumPy arrays."""

    xp = np

    def asarray(self, x: np.ndarray) -> Array:
        return x

    def to_numpy(self, x: Array) -> np.ndarray:
        return x


_NUMPY = _NumPy()


class Streams:
    """One MLX stream for each processor: the default stream of the CPU device and further ones.

    Each stream computes in a thread of its own.
    """

    def __init__(self) -> None:
        self._others = [mx.new_thread_local_stream(mx.cpu) for _ in range(cpu_count() - 1)]

    def shared(self, rows: int, columns: int, product: Callable[[slice, Any], Array]) -> Array:
        """Compute a product by dividing the rows of its weight among the streams.

        Args:
            rows: Number of rows of the weight.
            columns: Number of columns of the weight.
            product: Called as product(rows, stream) with a slice of the rows; None is the default
                stream. It returns (M, number of rows in the slice).
        Returns:
            (M, rows).
        """
        count = min(len(self._others) + 1, rows * columns // SHARED_WEIGHTS)
        if count < 2:
            return product(slice(None), None)
        ends = [rows * i // count for i in range(count + 1)]
        streams = [None, *self._others]
        parts = [product(slice(ends[i], ends[i + 1]), streams[i]) for i in range(count)]
        return mx.concatenate(parts, axis=1)


@cache
def streams() -> Streams:
    """Return the streams of this process.

    They are made once, since MLX keeps the streams that a computing thread gets from them.
    """
    return Streams()


def product(x: Array, part: dict[str, Any]) -> Array:
    """Multiply (M, K) float32 by a part of a weight with NumPy; return (M, N) float32.

    Quantized weights are expanded a tile of rows at a time, on all processors.
    """
    return mx.array(_product(np.asarray(x), _seen(part)))


def expert_product(x: Array, experts: Array, part: dict[str, Any]) -> Array:
    """Multiply each row of `x` by the matrix of its expert with NumPy.

    Args:
        x: (M, K) float32.
        experts: Expert of each row, (M,) int32.
        part: Part of an expert weight; its arrays have a leading axis X.
    Returns:
        (M, N) float32.
    """
    left, numbers, weights = np.asarray(x), np.asarray(experts), _seen(part)
    columns = next(a.shape[1] for a in weights.values() if isinstance(a, np.ndarray))
    result = np.empty((len(left), columns), np.float32)
    for number in np.unique(numbers):
        rows = numbers == number
        matrix = {n: a[number] if isinstance(a, np.ndarray) else a for n, a in weights.items()}
        result[rows] = _product(left[rows], matrix)
    return mx.array(result)


def _seen(part: dict[str, Any]) -> dict[str, Any]:
    """Return a part with NumPy arrays that share the memory of its MLX arrays."""
    return {n: np.asarray(a) if isinstance(a, mx.array) else a for n, a in part.items()}


def _product(left: np.ndarray, part: dict[str, Any]) -> np.ndarray:
    if "dense" in part:
        return left @ part["dense"].T
    layout = LAYOUTS[GGMLQuantizationType(part["type"])]
    weights = {n: a for n, a in part.items() if isinstance(a, np.ndarray)}
    rows, columns = len(weights["codes"]), left.shape[1]
    result = np.empty((len(left), rows), np.float32)
    step = max(1, TILE_CODES // columns)

    def tile(start: int) -> tuple[int, np.ndarray]:
        piece = {name: array[start : start + step] for name, array in weights.items()}
        return start, dequantized(piece, layout)

    count = cpu_count()
    with ThreadPoolExecutor(count) as threads:
        for first in range(0, rows, count * step):  # no more tiles at a time than threads
            starts = range(first, min(rows, first + count * step), step)
            for start, values in threads.map(tile, starts):
                np.matmul(left, values.T, out=result[:, start : start + step])
    return result


def attention(q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None) -> Array:
    """Compute the protocol's attention with NumPy, reading only the slots that were written."""
    numbers = np.asarray(slots)
    live = int(numbers.max()) + 1
    prefix = {name: np.asarray(array)[:, :, :live] for name, array in cache.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # the sampler reports NaNs
        return mx.array(_NUMPY.attention(np.asarray(q), prefix, numbers, scale, window))
