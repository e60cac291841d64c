"""The tensor protocol on MLX.

Loading does not change the values of weights. Quantized weights are stored in MLX's affine layout
(see `affine.py`). On a GPU, Q6_K, Q3_K and Q2_K stay in the blocks of the file (see `blocks.py`).
Products are float32 on a CPU. On a GPU a product of a few rows is float32, since reading the
weights takes longer than multiplying; a product of many rows (a prompt) uses the chosen dtype.
Norms, rotation and the residual stream are float32 everywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from phicore.backend import (
    DEFAULTS,
    NUM_EXPERTS_PER_TOK,
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
from phicore.gguf.reader import GGUFTensor
from phicore_mlx import affine, blocks, devices, host, namespace, uniforms
from phicore_mlx.affine import LAYOUTS, Layout

FEW_ROWS = 32
"""Largest number of rows whose product takes no longer than reading the weights, on a GPU."""
SORTED_ROWS = 64
"""Smallest number of rows for which the rows are sorted by expert, on a GPU."""


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise a `BackendError` of one line when MLX lacks memory or a folder to compile in."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "temp_directory_path" in str(error):
            raise BackendError(
                "backend mlx: there is no folder for temporary files, where MLX keeps what it "
                "compiles; set TMPDIR, or MLX_DISABLE_COMPILE=1"
            ) from error
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        reason = (str(error).strip() or "MemoryError").splitlines()[0]
        raise BackendError(
            f"backend mlx: not enough memory ({reason}); a shorter prompt or context, or a smaller "
            "quantization, needs less"
        ) from error


DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class MlxBackend(Backend):
    """MLX on one device.

    A weight is a tuple of parts, stacked along the rows. A part is a dictionary, so that
    `mx.compile` can look inside. It holds one of three forms: `dense` (N, K); `blocks` (N, bytes of
    a row) uint8; or the arrays that `affine.transcode` returns. The last two come with `type`, the
    number of the GGUF type. The arrays of expert weights have a leading axis X, the expert, and
    never have the form `blocks`.
    """

    xp = namespace

    def __init__(self, options: BackendOptions = DEFAULTS) -> None:
        name, self._device = devices.find_device(options.device)
        is_cpu = name == "cpu"
        with self._on_device():
            has_uniforms = not is_cpu and uniforms.is_usable()
        capabilities = Capabilities(
            device=name,
            cache_types=cache_types.available(namespace, "f32")
            if is_cpu
            else cache_types.available(namespace, "f16", "bf16"),
            dtypes=("float32",) if is_cpu else ("float16", "bfloat16", "float32"),
            has_compact=True,
            compiles=True,
            compiled_tokens=host.ROWS - 1 if is_cpu else None,
            asynchronous=True,
            random_on_device=has_uniforms,
        )
        super().__init__(options, capabilities)
        self._streams = host.streams() if is_cpu else None
        if not is_cpu:
            devices.wire_memory()
        self._thread = threading.local()  # `is_tracing`: whether this thread is tracing a function

    # ---- edges -----------------------------------------------------------------------------

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        devices.end_streams_with_thread()
        with memory_errors(), mx.stream(self._device):
            yield

    def _check_room(self, needed: int) -> None:
        if self._streams is not None:
            devices.check_room(needed)

    def asarray(self, x: np.ndarray) -> Array:
        with self._on_device():
            return mx.array(np.array(x, order="C"))

    def to_numpy(self, x: Array) -> np.ndarray:
        with self._on_device():
            return np.array(x)

    def load_weight(self, matrix: Matrix) -> Weight:
        with self._on_device():
            self._check_room(sum(map(_loaded_bytes, matrix.parts)))
            parts = [
                self._load(list(alike)) for _, alike in groupby(matrix.parts, lambda p: p.type)
            ]
            mx.eval(parts)
        return tuple(parts)

    def load_experts(self, matrices: Sequence[Matrix]) -> Weight:
        count = len(matrices)
        with self._on_device():
            self._check_room(sum(_loaded_bytes(p) for matrix in matrices for p in matrix.parts))
            parts = []
            for _, alike in groupby(range(len(matrices[0].parts)), _type_of(matrices[0])):
                numbers = list(alike)
                tensors = [matrix.parts[i] for matrix in matrices for i in numbers]
                part = self._load(tensors, has_blocks=False)
                for name, array in part.items():
                    if isinstance(array, mx.array):
                        part[name] = array.reshape(count, -1, array.shape[-1])
                parts.append(part)
            mx.eval(parts)
        return tuple(parts)

    def _load(self, tensors: list[GGUFTensor], has_blocks: bool = True) -> dict[str, Any]:
        """Load tensors of one type as one part of a weight."""
        ggml_type = tensors[0].type
        if ggml_type not in LAYOUTS:
            return {"dense": mx.concatenate([self._dense(tensor) for tensor in tensors])}
        part: dict[str, Any] = {"type": int(ggml_type)}
        if has_blocks and self._streams is None and blocks.is_usable(ggml_type):
            part["blocks"] = mx.concatenate([mx.array(tensor.data) for tensor in tensors])
            return part
        for name, array in affine.transcode(tensors).items():
            part[name] = mx.array(
                _halved(array) if self.options.compact and name != "codes" else array
            )
        return part

    def _dense(self, tensor: GGUFTensor) -> Array:
        if self._streams is None and tensor.type == GGMLQuantizationType.F16:
            return mx.array(tensor.data.view(np.float16))
        if self._streams is None and tensor.type == GGMLQuantizationType.BF16:
            return mx.array(tensor.data.view(np.uint16)).view(mx.bfloat16)
        return mx.array(tensor.dequantize())

    def compile(self, fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        compiled = mx.compile(fn)
        # Shapes of array arguments for which `fn` cannot be traced. Only the number of tokens
        # decides that, so arrays inside containers are not part of the key.
        untraceable: set[Any] = set()

        def call(*args: Any) -> Any:
            key = tuple(a.shape for a in args if isinstance(a, mx.array))
            # MLX overwrites an array in place only if nothing else refers to it.
            args = tuple(_taken(a) if i in donate else a for i, a in enumerate(args))
            with self._on_device():
                result = None
                if key not in untraceable:
                    self._thread.is_tracing = True
                    try:
                        result = compiled(*args)
                    except host.NeedsHostError:
                        untraceable.add(key)
                    finally:
                        self._thread.is_tracing = False
                if key in untraceable:
                    result = fn(*args)
                del args
                mx.async_eval(result)
            return result

        return call

    def peak_memory_bytes(self) -> int | None:
        return super().peak_memory_bytes() if self._streams else int(mx.get_peak_memory())

    # ---- products --------------------------------------------------------------------------

    def linear(self, x: Array, weight: Weight) -> Array:
        flat = x.reshape(-1, x.shape[-1])
        products = [self._product(flat, part) for part in weight]
        y = products[0] if len(products) == 1 else mx.concatenate(products, axis=1)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _product(self, x: Array, part: dict[str, Any]) -> Array:
        if self._is_for_host(x.shape[0]):
            return host.product(x, part)
        if "dense" in part:
            weight = part["dense"]
            # converting a 16-bit weight to float32 would take several times as long as reading it
            dtype = mx.float32 if self.options.dtype == "float32" else weight.dtype
            return (x.astype(dtype) @ weight.T.astype(dtype)).astype(mx.float32)
        ggml_type = GGMLQuantizationType(part["type"])
        dtype = mx.float32 if x.shape[0] <= FEW_ROWS else self._product_dtype()
        if "blocks" in part:
            if x.shape[0] <= blocks.FEW_ROWS:
                return blocks.product(x, part["blocks"], ggml_type)
            ids = mx.arange(part["blocks"].shape[0], dtype=mx.int32)
            weight = blocks.expanded(ids, part["blocks"], ggml_type, dtype)
            return (x.astype(dtype) @ weight.T).astype(mx.float32)
        layout = LAYOUTS[ggml_type]
        if self._streams is None:
            return _affine_product(x.astype(dtype), part, layout).astype(mx.float32)
        return self._streams.shared(
            part["codes"].shape[0],
            x.shape[1],
            lambda rows, stream: _affine_product(x, _rows(part, rows), layout, stream),
        )

    def expert_linear(self, x: Array, experts: Array, weight: Weight) -> Array:
        if self._streams is not None or x.shape[0] < SORTED_ROWS:
            products = [self._expert_product(x, experts, part) for part in weight]
            return products[0] if len(products) == 1 else mx.concatenate(products, axis=1)
        order = mx.argsort(experts)
        products = [self._expert_product(x[order], experts[order], part) for part in weight]
        return mx.concatenate(products, axis=1)[mx.argsort(order)]

    def _expert_product(self, x: Array, experts: Array, part: dict[str, Any]) -> Array:
        if self._is_for_host(x.shape[0] // NUM_EXPERTS_PER_TOK):
            return host.expert_product(x, experts, part)
        is_sorted = self._streams is None and x.shape[0] >= SORTED_ROWS
        dtype = mx.float32 if x.shape[0] <= FEW_ROWS else self._product_dtype()
        x = mx.expand_dims(x, axis=1)  # (M, 1, K)
        if "dense" in part:
            # for the reason in `_product`; a conversion here would convert every expert
            dtype = mx.float32 if self.options.dtype == "float32" else part["dense"].dtype
            weight = part["dense"].swapaxes(1, 2).astype(dtype)
            y = mx.gather_mm(x.astype(dtype), weight, rhs_indices=experts, sorted_indices=is_sorted)
            return y[:, 0].astype(mx.float32)
        layout = LAYOUTS[GGMLQuantizationType(part["type"])]
        if self._streams is None:
            y = _affine_product(x.astype(dtype), part, layout, None, experts, is_sorted)
            return y[:, 0].astype(mx.float32)
        return self._streams.shared(
            part["codes"].shape[1],
            x.shape[2],
            lambda rows, stream: _affine_product(
                x, _rows(part, (slice(None), rows)), layout, stream, experts
            )[:, 0],
        )

    def _product_dtype(self) -> Any:
        return DTYPES[self.options.dtype or self.capabilities.dtypes[0]]

    def _is_for_host(self, rows: int) -> bool:
        """Return whether NumPy computes an operation on this many tokens.

        Raises:
            NeedsHostError: If it does and a function is being traced.
        """
        if self._streams is None or rows < host.ROWS:
            return False
        if getattr(self._thread, "is_tracing", False):
            raise host.NeedsHostError
        return True

    def embedding(self, ids: Array, weight: Weight) -> Array:
        flat = ids.reshape(-1)
        start, values = 0, None
        for part in weight:
            rows = _row_count(part)
            # MLX does not check an index
            index = mx.clip(flat - start, 0, rows - 1)
            found = self._expanded(index, part)
            is_here = (flat >= start)[:, None]
            values = found if values is None else mx.where(is_here, found, values)
            start += rows
        assert values is not None
        return values.reshape(*ids.shape, -1)

    def _expanded(self, index: Array, part: dict[str, Any]) -> Array:
        if "dense" in part:
            return part["dense"][index].astype(mx.float32)
        ggml_type = GGMLQuantizationType(part["type"])
        if "blocks" in part:
            return blocks.expanded(index, part["blocks"], ggml_type, mx.float32)
        return _dequantized(_rows(part, index), LAYOUTS[ggml_type])

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return mx.fast.rms_norm(x, weight, eps)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        return mx.fast.layer_norm(x, weight, bias, eps)

    # ---- cache -----------------------------------------------------------------------------

    def new_cache(self, batch: int, heads: int, capacity: int, head_dim: int) -> LayerCache:
        with self._on_device():
            cache = super().new_cache(batch, heads, capacity, head_dim)  # not computed yet
            self._check_room(sum(a.nbytes for a in cache.values()))
            mx.eval(cache)
        return cache

    def grow_cache(self, cache: LayerCache, capacity: int) -> LayerCache:
        with self._on_device():
            self._check_room(sum(a.nbytes // a.shape[2] * capacity for a in cache.values()))
            grown = super().grow_cache(cache, capacity)
            mx.eval(grown)
        return grown

    def shift_cache(self, cache: LayerCache, count: Array) -> LayerCache:
        if count.shape[0] > 1:
            return super().shift_cache(cache, count)

        def shift(a: Array) -> Array:
            return mx.slice(mx.concatenate([a, a], axis=2), count, (2,), a.shape)

        return {name: shift(a) for name, a in cache.items()}

    def update_cache(self, cache: LayerCache, k: Array, v: Array, slots: Array) -> LayerCache:
        # The arrays are popped from the cache that was passed in, because MLX overwrites an array
        # in place only if nothing else refers to it.
        new = cache_types.stored(namespace, k, v, self._cache_type)
        return {name: _put(cache.pop(name), a, slots) for name, a in new.items()}

    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        if self._is_for_host(q.shape[2]):
            return host.attention(q, cache, slots, scale, window)
        i = slots[:, None, :, None]  # (B, 1, T, 1)
        j = mx.arange(cache["k"].shape[2], dtype=mx.int32)
        visible = j <= i if window is None else (j <= i) & (j > i - window)
        k, v = cache["k"], cache["v"]
        if self._streams is not None or "k_scale" in cache:  # 16-bit floats are slow on a CPU
            k, v = cache_types.numbers(namespace, cache)
        y = mx.fast.scaled_dot_product_attention(q.astype(k.dtype), k, v, scale=scale, mask=visible)
        return y.astype(mx.float32)

    def contains(self, ids: Array, size: int) -> Array:
        # ids out of range are written to the last column, which is then dropped
        index = mx.where((ids >= 0) & (ids < size), ids, size)
        found = mx.zeros((ids.shape[0], size + 1), mx.bool_)
        return mx.put_along_axis(found, index, mx.array(True), axis=1)[:, :size]

    def uniforms(self, key: Array, step: Array, size: int) -> Array:
        if self._streams is not None:
            return super().uniforms(key, step, size)
        return uniforms.uniforms(key, step, size)


def _type_of(matrix: Matrix) -> Callable[[int], GGMLQuantizationType]:
    return lambda number: matrix.parts[number].type


def _loaded_bytes(tensor: GGUFTensor) -> int:
    """Return the number of bytes that a tensor takes after loading on a CPU."""
    layout = LAYOUTS.get(tensor.type)
    return int(prod(tensor.shape) * (layout.bits_per_weight if layout else 32) / 8)


def _halved(array: np.ndarray) -> np.ndarray:
    """Convert to float16, or return the array unchanged if a number would overflow."""
    with np.errstate(over="ignore"):
        halved = array.astype(np.float16)
    return halved if np.isfinite(halved).all() else array


def _taken(container: Any) -> Any:
    """Move a container's contents to new containers, recursively; the old ones become empty."""
    if isinstance(container, dict):
        taken: Any = {name: _taken(value) for name, value in container.items()}
        container.clear()
        return taken
    if isinstance(container, list):
        taken = [_taken(value) for value in container]
        container.clear()
        return taken
    return container


def _row_count(part: dict[str, Any]) -> int:
    return next(int(a.shape[0]) for a in part.values() if isinstance(a, mx.array))


def _rows(part: dict[str, Any], index: Any) -> dict[str, Any]:
    """Index each array of a part by `index`, which selects rows."""
    return {n: a[index] if isinstance(a, mx.array) else a for n, a in part.items()}


def _affine_product(
    x: Array,
    part: dict[str, Any],
    layout: Layout,
    stream: Any = None,
    experts: Array | None = None,
    is_sorted: bool = False,
) -> Array:
    """Multiply activations by a part in MLX's affine layout.

    Args:
        x: (M, K); with `experts` (M, 1, K).
        experts: Expert of each row, (M,) int32.
        is_sorted: Whether `experts` is in ascending order.
    Returns:
        (M, N); with `experts` (M, 1, N).
    """
    choices: dict[str, Any] = {"group_size": layout.group_size, "bits": layout.bits}
    multiply: Callable[..., Array] = mx.quantized_matmul
    if experts is not None:
        multiply = mx.gather_qmm
        choices |= {"rhs_indices": experts, "sorted_indices": is_sorted}

    def product(x: Array, suffix: str) -> Array:
        scales, biases = part[f"scales{suffix}"], part[f"biases{suffix}"]
        if x.dtype != mx.float32:
            scales, biases = scales.astype(x.dtype), biases.astype(x.dtype)
        return multiply(x, part["codes"], scales, biases, transpose=True, stream=stream, **choices)

    if not layout.is_split:
        return product(x, "")
    is_first = _is_first_half(x.shape[-1], layout)
    return mx.add(
        product(mx.where(is_first, x, 0), ""),
        product(mx.where(is_first, 0, x), "2"),
        stream=stream,
    )


def _dequantized(part: dict[str, Any], layout: Layout) -> Array:
    """Return the values of a part in MLX's affine layout, (N, K) float32."""

    def values(suffix: str) -> Array:
        return mx.dequantize(
            part["codes"],
            part[f"scales{suffix}"].astype(mx.float32),  # MLX computes in the type of the scales
            part[f"biases{suffix}"].astype(mx.float32),
            group_size=layout.group_size,
            bits=layout.bits,
        )

    first = values("")
    if layout.is_split:
        first = mx.where(_is_first_half(first.shape[1], layout), first, values("2"))
    return first


def _is_first_half(columns: int, layout: Layout) -> Array:
    """Mark the columns that lie in the first half of their group, (K,) bool."""
    return mx.arange(columns) % layout.group_size < layout.group_size // 2


def _put(old: Array, new: Array, slots: Array) -> Array:
    """Write new tokens (B, K, T, ...) into a cache (B, K, S, ...), from slots[:, 0] on."""
    if new.shape[0] == 1:
        return mx.slice_update(old, new, slots[0, :1], axes=[2])
    for b in range(new.shape[0]):
        start = mx.concatenate([mx.array([b], mx.int32), slots[b, :1]])
        old = mx.slice_update(old, new[b : b + 1], start, axes=[0, 2])
    return old
