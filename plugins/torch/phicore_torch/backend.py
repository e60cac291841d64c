"""The tensor protocol on PyTorch.

Quantized weights are stored as codes of 8 bits with the scales and biases of their groups. Each
product expands them to float32; for one row of activations a compiled kernel does this. Types
without a form of codes, scales and biases are stored dense. Products, norms and attention are
float32. On CUDA torch multiplies in float32, not in TF32, unless it is told otherwise. Only the
kernel for one row is compiled; everything else runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

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
from phicore.errors import BackendError
from phicore.gguf.matrix import Matrix
from phicore.gguf.quants import affine, is_affine
from phicore.gguf.reader import GGUFTensor
from phicore_torch import namespace


def device_names() -> list[str]:
    """Return the devices of this machine that torch can use, out of `cpu`, `cuda`, `cuda:1`, `mps`.

    `cpu` comes first.
    """
    gpus = [f"cuda:{i}" if i else "cuda" for i in range(torch.cuda.device_count())]
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


class TorchBackend(Backend):
    """PyTorch on one device.

    A weight is a tuple of parts, stacked along the rows. A part is a dense array (N, K), or codes
    (N, G, n) uint8 with scales and biases (N, G), where G is the number of groups in a row and n
    the size of a group. The arrays of expert weights have a leading axis X, the expert.
    """

    xp = namespace

    def __init__(self, options: BackendOptions = DEFAULTS) -> None:
        names = device_names()
        device = options.device or (names[1] if len(names) > 1 else "cpu")
        if device not in names:
            raise BackendError(
                f"backend torch: no device {device!r} (available: {', '.join(names)})"
            )
        types = cache_types.available(namespace, "f32")
        super().__init__(options, Capabilities(device=device, cache_types=types))
        self._device = torch.device(device)
        self._product: Callable[..., Array] | None = None  # compiled when it is used

    def asarray(self, x: np.ndarray) -> Array:
        return torch.tensor(np.array(x, order="C"), device=self._device)  # a copy

    def to_numpy(self, x: Array) -> np.ndarray:
        return x.detach().cpu().numpy()

    def compile(self, fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with torch.inference_mode(), self._device:  # new arrays are made on this device
                return fn(*args)

        return run

    # ---- weights ---------------------------------------------------------------------------

    def load_weight(self, matrix: Matrix) -> Weight:
        return tuple(self._load(part) for part in matrix.parts)

    def load_experts(self, matrices: Sequence[Matrix]) -> Weight:
        loaded = [self.load_weight(matrix) for matrix in matrices]
        return tuple(
            tuple(torch.stack(arrays) for arrays in zip(*parts, strict=True))
            for parts in zip(*loaded, strict=True)
        )

    def _load(self, part: GGUFTensor) -> tuple[Array, ...]:
        if not is_affine(part.type):
            return (self.asarray(part.dequantize()),)
        found = affine(part.type, part.data)
        codes = found.codes.reshape(*found.scales.shape, -1)
        biases = -found.offset * found.scales if found.biases is None else found.biases
        return tuple(self.asarray(array) for array in (codes, found.scales, biases))

    def linear(self, x: Array, weight: Weight) -> Array:
        if x.numel() > x.shape[-1]:
            return torch.cat([F.linear(x, _values(part)) for part in weight], dim=-1)
        parts = [self._row_product(x.reshape(-1), *part) for part in weight]
        return torch.cat(parts).reshape(*x.shape[:-1], -1)

    def _row_product(self, x: Array, *part: Array) -> Array:
        if len(part) == 1:
            return part[0] @ x
        if self._product is None:  # dynamic shapes, so that torch does not compile for each matrix
            self._product = torch.compile(_product, dynamic=True)
        try:
            return self._product(x, *part)
        except RuntimeError:  # for example, this machine has no compiler
            self._product = _product
            return _product(x, *part)

    def expert_linear(self, x: Array, experts: Array, weight: Weight) -> Array:
        columns = sum(part[0].shape[1] for part in weight)
        y = x.new_empty((x.shape[0], columns))
        for number in torch.unique(experts).tolist():
            rows = experts == number
            y[rows] = self.linear(x[rows], [tuple(a[number] for a in part) for part in weight])
        return y

    def embedding(self, ids: Array, weight: Weight) -> Array:
        flat, start = ids.reshape(-1).long(), 0
        values = None
        for part in weight:
            rows = part[0].shape[0]
            index = (flat - start).clamp(0, rows - 1)
            found = _values(tuple(array[index] for array in part))
            is_here = (flat >= start)[:, None]
            values = found if values is None else torch.where(is_here, found, values)
            start += rows
        assert values is not None
        return values.reshape(*ids.shape, -1)

    # ---- operations that torch provides ----------------------------------------------------

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return F.rms_norm(x, weight.shape, weight, eps)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def update_cache(self, cache: LayerCache, k: Array, v: Array, slots: Array) -> LayerCache:
        rows = torch.arange(slots.shape[0])[:, None]
        new = cache_types.stored(namespace, k, v, self._cache_type)
        for name, old in cache.items():
            old[rows, :, slots.long()] = new[name].swapaxes(1, 2)
        return cache

    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        live = int(slots.max()) + 1
        k, v = cache_types.numbers(namespace, {name: a[:, :, :live] for name, a in cache.items()})
        i, j = slots[:, None, :, None], torch.arange(live)
        visible = j <= i if window is None else (j <= i) & (j > i - window)
        return F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)


def _values(part: tuple[Array, ...]) -> Array:
    """Return a part's values, (N, K) float32."""
    if len(part) == 1:
        return part[0]
    codes, scales, biases = part
    return torch.addcmul(biases[..., None], codes.float(), scales[..., None]).flatten(1)


def _product(x: Array, codes: Array, scales: Array, biases: Array) -> Array:
    """Multiply quantized weights by one row of activations (K,); return (N,)."""
    groups = x.reshape(codes.shape[1:])  # (G, n)
    dots = (codes.float() * groups).sum(-1)
    return (dots * scales + biases * groups.sum(-1)).sum(-1)
