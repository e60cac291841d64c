"""What MLX's CPU device does not do well: products of many rows, and the second processor.

MLX's wheel for Linux multiplies matrices with the reference BLAS, at 1 % of the speed of NumPy's,
and reads quantized ones with one thread. NumPy sees the memory of MLX's arrays, so it takes prompts
over; and rows of a weight are shared among streams, each of which has a thread.
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
"""From this many rows of activations on NumPy is faster, though it has to expand weights."""

SHARED_WEIGHTS = 1 << 18
"""A product of this many weights takes longer than handing a part of it to a thread."""


class NeedsHostError(Exception):
    """A trace would need values: this shape has to run as it is, operation by operation."""


class _NumPy(Backend):
    """The protocol's defaults on arrays of the host."""

    xp = np

    def asarray(self, x: np.ndarray) -> Array:
        return x

    def to_numpy(self, x: Array) -> np.ndarray:
        return x


_NUMPY = _NumPy()


class Streams:
    """Threads of MLX's CPU device, this thread's default one among them."""

    def __init__(self) -> None:
        self._others = [mx.new_thread_local_stream(mx.cpu) for _ in range(cpu_count() - 1)]

    def shared(self, rows: int, columns: int, product: Callable[[slice, Any], Array]) -> Array:
        """A product (M, rows), computed in pieces of a few rows: product(rows, stream)."""
        count = min(len(self._others) + 1, rows * columns // SHARED_WEIGHTS)
        if count < 2:
            return product(slice(None), None)
        ends = [rows * i // count for i in range(count + 1)]
        streams = [None, *self._others]
        parts = [product(slice(ends[i], ends[i + 1]), streams[i]) for i in range(count)]
        return mx.concatenate(parts, axis=1)


@cache
def streams() -> Streams:
    """The streams of this process. MLX gives each thread that computes its own, for good."""
    return Streams()


def product(x: Array, part: dict[str, Any]) -> Array:
    """(M, K) by a part of a weight: (M, N), in float32 and in NumPy.

    Quantized weights are expanded a tile of rows at a time, on all processors.
    """
    return mx.array(_product(np.asarray(x), _seen(part)))


def expert_product(x: Array, experts: Array, part: dict[str, Any]) -> Array:
    """`product` of each row (M, K) and the matrix of its expert, int32 (M,): (M, N)."""
    left, numbers, weights = np.asarray(x), np.asarray(experts), _seen(part)
    columns = next(a.shape[1] for a in weights.values() if isinstance(a, np.ndarray))
    result = np.empty((len(left), columns), np.float32)
    for number in np.unique(numbers):
        rows = numbers == number
        matrix = {n: a[number] if isinstance(a, np.ndarray) else a for n, a in weights.items()}
        result[rows] = _product(left[rows], matrix)
    return mx.array(result)


def _seen(part: dict[str, Any]) -> dict[str, Any]:
    """A part with NumPy's arrays, which share the memory of MLX's."""
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
    """The protocol's attention over what is live of the cache, in NumPy."""
    numbers = np.asarray(slots)
    live = int(numbers.max()) + 1
    prefix = {name: np.asarray(array)[:, :, :live] for name, array in cache.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # the sampler tells of NaNs
        return mx.array(_NUMPY.attention(np.asarray(q), prefix, numbers, scale, window))
