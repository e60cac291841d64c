"""The tensor protocol on NumPy: dense float32 weights, one line for most operations.

The required part, `xp` and the conversions `asarray` and `to_numpy`, is enough to run everything.
The other methods save work, which NumPy can do because it sees values: they multiply by the chosen
experts alone, write a cache in place, read only its written slots, and look tokens up by index.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from phicore.backend import (
    DEFAULTS,
    Array,
    Backend,
    BackendOptions,
    Capabilities,
    LayerCache,
    Weight,
    cache_types,
)
from phicore.gguf.matrix import Matrix


class NumpyBackend(Backend):
    """NumPy on the CPU, with the BLAS that NumPy was built with."""

    xp = np

    def __init__(self, options: BackendOptions = DEFAULTS) -> None:
        super().__init__(options, Capabilities(cache_types=cache_types.available(np, "f32")))

    def asarray(self, x: np.ndarray) -> Array:
        return np.array(x)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x)

    def load_weight(self, matrix: Matrix) -> Weight:
        return matrix.dequantize()  # like the default, but without a copy

    def compile(self, fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            # exp(-gate) may be inf; its reciprocal, 0, is right. The sampler reports NaNs.
            with np.errstate(all="ignore"):
                return fn(*args)

        return run

    def expert_linear(self, x: Array, experts: Array, weight: Weight) -> Array:
        y = np.empty((len(x), weight.shape[1]), np.float32)
        for number in np.unique(experts):
            rows = experts == number
            y[rows] = x[rows] @ weight[number].T
        return y

    def update_cache(self, cache: LayerCache, k: Array, v: Array, slots: Array) -> LayerCache:
        rows = np.arange(slots.shape[0])[:, None]  # (B, 1), against (B, T)
        new = cache_types.stored(np, k, v, self._cache_type)
        for name, old in cache.items():
            old[rows, :, slots] = new[name].swapaxes(1, 2)
        return cache

    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        live = int(slots.max()) + 1
        prefix = {name: a[:, :, :live] for name, a in cache.items()}
        return super().attention(q, prefix, slots, scale, window)

    def contains(self, ids: Array, size: int) -> Array:
        # ids out of range are written to the last column, which is then dropped
        found = np.zeros((ids.shape[0], size + 1), bool)
        rows = np.arange(ids.shape[0])[:, None]
        found[rows, np.where((ids >= 0) & (ids < size), ids, size)] = True
        return found[:, :size]
