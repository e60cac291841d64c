"""The tensor protocol on JAX.

Weights stay quantized. phicore has its own kernels for some operations:

- On a CPU (see `kernels`): products, rows of the embedding, the cache and attention.
- On an NVIDIA GPU (see `cuda`): products, and the cache and attention of one token per sequence.

Where the kernels cannot be used, weights are expanded inside the product (see `expanded`). All
other operations are the protocol's defaults, fused by XLA. The cache is updated in place through
buffer donation.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs
from jax import lax
from jax.sharding import SingleDeviceSharding

from phicore.backend import (
    DEFAULTS,
    Array,
    Backend,
    BackendOptions,
    Capabilities,
    LayerCache,
    ProgramStore,
    Weight,
    philox,
)
from phicore.errors import BackendError
from phicore.gguf.matrix import Matrix, Split
from phicore.gguf.reader import GGUFFile
from phicore_jax import code_files, cuda, expanded
from phicore_jax.cache import FORMS, as_numbers, as_stored, names, put, rows_of_cache, width, zeros
from phicore_jax.kernels import find_kernels
from phicore_jax.outline import Outline, joined
from phicore_jax.own import OwnKernels, Pack, Source
from phicore_jax.parallel import Devices, ShardedCache, Share
from phicore_jax.programs import KeptKernels, Programs, conditions

# XLA's other schedulers first compute whatever does not depend on the input. Here this is every
# expanded weight of the model, and all would be in memory at once. With this scheduler, memory use
# stays small, fits the processor's caches better, and prefill takes half the time.
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


STEPS = 8
"""Decode steps per call on a GPU. Single steps would be too short for the host to keep up."""
CHUNKS = (1, 256, 2048)
"""Chunk sizes for prompts on a GPU. There are few, since a step is compiled for each, and they are
large, since the weights are expanded again for each chunk."""
QUERIES = 256
"""Number of queries whose attention scores are in memory at a time."""
IDLE_S = 1.0
"""A backend that has run no compiled function for this time is not busy."""


def device_names() -> list[str]:
    """Return the names of the local devices that JAX can use: `cpu`, `cuda`, `cuda:1`, ..."""
    return ["cpu", *(_name(device) for device in _cuda_devices())]


def _cuda_devices() -> list[Any]:
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:  # no CUDA plugin, or no GPU
        return []


def _name(device: Any) -> str:
    return f"cuda:{device.id}" if device.id else "cuda"


def find_device(name: str | None) -> Any:
    """Return the JAX device with this name; for None, the first GPU, or the CPU if there is none.

    Raises:
        BackendError: If there is no such device. The message lists the available devices.
    """
    if name is None:
        gpus = _cuda_devices()
        return gpus[0] if gpus else jax.local_devices(backend="cpu")[0]
    if name == "cpu":
        return jax.local_devices(backend="cpu")[0]
    for device in _cuda_devices():
        if name in (_name(device), f"cuda:{device.id}"):
            return device
    hint = "; for NVIDIA GPUs install phicore-jax[cuda]" if name.startswith("cuda") else ""
    raise BackendError(
        f"backend jax: no device {name!r} (available: {', '.join(device_names())}){hint}"
    )


def keep_compiled_programs() -> bool:
    """Let XLA cache compiled programs on disk, so that the next start loads them.

    This changes JAX's configuration for the process. It changes nothing if the user has already
    chosen a folder (JAX_COMPILATION_CACHE_DIR, or jax.config), or if phicore's cache folder cannot
    be written to.

    Returns:
        Whether they are kept in phicore's cache folder.
    """
    folder = platformdirs.user_cache_path("phicore") / f"jax-{jax.__version__}"
    if jax.config.jax_compilation_cache_dir is not None:
        return jax.config.jax_compilation_cache_dir == str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    if not os.access(folder, os.W_OK):
        return False
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # A disk that is full and a file that is damaged cost time alone, and are no news for each step.
    for what in ("writing", "reading"):
        warnings.filterwarnings("ignore", f"Error {what} persistent compilation cache entry")
    threading.Thread(target=code_files.remove_damaged, args=(folder,), daemon=True).start()
    return True


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn XLA's out-of-memory error, whichever exception reports it, into a BackendError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise BackendError(
            f"backend jax: not enough memory ({reason}); a shorter prompt or context, or a smaller "
            "quantization, needs less"
        ) from error


def rows_of(part: Any) -> int:
    """Return the number of rows of a part of a weight."""
    return part.rows if hasattr(part, "rows") else int(jax.tree.leaves(part)[0].shape[0])


def capabilities_of(device: str, kernels: OwnKernels | None, steps: int) -> Capabilities:
    """Describe a backend on `device` that has `kernels` and runs up to `steps` steps at once."""
    found = Capabilities(
        device=device,
        has_devices=True,
        compiles=True,
        asynchronous=True,
        steps=steps,
        cache_types=names("f32"),
    )
    if device != "cpu":
        found = replace(found, prompt_chunks=CHUNKS)
    if kernels is not None:
        found = replace(
            found,
            cache_types=names(kernels.cache_type),
            has_fast_prefill=kernels.has_fast_products,
            has_threads=kernels.has_threads,
            random_on_device=kernels.has_uniforms,
            linear_error=3e-5,
        )
    return found


class JaxBackend(Backend):
    """JAX on one device, or on several that share the model.

    Args:
        options: What the user chose.
        kernels: The kernels to use. "host" selects the kernels for the device, if they work there.
            None leaves everything to XLA.
        steps: The number of decode steps that a compiled call runs. None selects the number for
            the device.
    """

    xp = jnp

    def __init__(
        self,
        options: BackendOptions = DEFAULTS,
        kernels: OwnKernels | Literal["host"] | None = "host",
        steps: int | None = None,
    ) -> None:
        self.device = find_device(options.device)
        is_cpu = self.device.platform == "cpu"
        self._keeps_programs = keep_compiled_programs()
        if kernels == "host":
            kernels, _ = find_kernels() if is_cpu else cuda.working_kernels(self.device)
        self._kernels = kernels
        if steps is None:  # on GPUs, loops were tested with these kernels only
            steps = 1 if is_cpu or kernels is None else STEPS
        name = "cpu" if is_cpu else _name(self.device)
        capabilities = capabilities_of(name, kernels, steps)
        super().__init__(options, capabilities)
        self._packing_device = self.device
        self._copier = lru_cache(FORMS)(self._new_copier)
        self._shared: Devices | None = None
        self._loading = threading.local()  # several threads may each load a model
        self._calls, self._called_s = 0, time.monotonic()
        if options.devices != 1:
            self._shared = Devices(self.device, options.devices)
        if kernels is not None and options.threads is not None:
            kernels.set_threads(options.threads)

    def asarray(self, x: np.ndarray) -> Array:
        return self._put(np.array(x))

    def _put(self, x: np.ndarray) -> Array:
        """Copy an array to the device. JAX may share its memory, so nobody else may hold it."""
        with memory_errors():
            return self._shared.put(x) if self._shared else jax.device_put(x, self.device)

    def asarray_of_shares(self, vectors: Sequence[np.ndarray]) -> Array:
        shares = [np.concatenate(s) for s in zip(*(self._cut(v) for v in vectors), strict=True)]
        assert self._shared is not None
        return self._shared.put_shares({n: shares[n] for n in self._shared.mine})

    def _cut(self, vector: np.ndarray) -> list[np.ndarray]:
        return np.split(vector, self.options.devices)

    def to_numpy(self, x: Array) -> np.ndarray:
        with self._busy(), memory_errors():  # somebody waits for the device
            return np.asarray(x)

    @contextmanager
    def loading(self, file: GGUFFile) -> Iterator[None]:
        if self._kernels is None or self._shared or not self.options.packed_cache:
            yield
            return
        with self._kernels.loading(file, self._is_busy) as self._loading.pack:
            try:
                yield
            finally:
                del self._loading.pack

    def _pack(self, *args: Any) -> Any:
        """Pack tensors for the kernels, which may reuse those of the file that is loaded."""
        assert self._kernels is not None
        pack: Pack = getattr(self._loading, "pack", self._kernels.pack)
        return pack(*args)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._called_s = time.monotonic()

    def _is_busy(self) -> bool:
        return self._calls > 0 or time.monotonic() - self._called_s < IDLE_S

    def load_weight(self, matrix: Matrix) -> Weight:
        if self._shared and matrix.split:
            return self._load_shares(matrix.split, lambda n: self._packed(self._share(matrix, n)))
        return tuple(jax.tree.map(self._put, p) for p in self._packed(matrix))

    def _load_shares(self, split: Split, pack: Callable[[int], list[Any]]) -> Weight:
        assert self._shared is not None
        with memory_errors():
            parts = self._shared.put_shares({n: tuple(pack(n)) for n in self._shared.mine})
        return Share(parts, is_sum=split.sections is None, is_all=split.is_gathered)

    def _share(self, matrix: Matrix, number: int) -> Matrix:
        return matrix.share(number, self.options.devices)

    def _packed(self, matrix: Matrix) -> list[Any]:
        packed: list[Any] = []
        for part in joined(matrix.parts):
            if self._kernels is not None and self._kernels.has_type(part[0].type):
                with jax.default_device(self._packing_device):
                    packed.append(self._pack(part))
            else:
                packed.extend(expanded.pack(replace(matrix, parts=tuple(part))))
        return packed

    def load_experts(self, matrices: Sequence[Matrix]) -> Weight:
        split = matrices[0].split
        if self._shared and split:
            return self._load_shares(
                split, lambda n: self._packed_experts([self._share(m, n) for m in matrices])
            )
        return tuple(jax.tree.map(self._put, p) for p in self._packed_experts(matrices))

    def _packed_experts(self, matrices: Sequence[Matrix]) -> list[Any]:
        packed: list[Any] = []
        groups = zip(*(joined(matrix.parts) for matrix in matrices), strict=True)
        for group in groups:  # a group has one part of the matrix, of every expert
            tensors = [tensor for part in group for tensor in part]
            if self._kernels is not None and self._kernels.has_experts(tensors[0].type):
                packed.append(self._pack(tensors, len(matrices)))
            else:
                pairs = zip(matrices, group, strict=True)
                packed.extend(expanded.pack_experts([replace(m, parts=tuple(p)) for m, p in pairs]))
        return packed

    def compile(self, fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        return self._guarded(self._jit(fn, donate))

    def kept_programs(self, model: str) -> ProgramStore | None:
        is_usual = type(self) is JaxBackend and self._shared is None and self._keeps_programs
        if not is_usual or not isinstance(self._kernels, KeptKernels):
            return None
        found = conditions(self._kernels, self.options)
        if found is None:
            return None
        outline = Outline(self._kernels, self.device, self.options, self.capabilities)
        return Programs(self._kernels, found, model, outline, self.device, self._jit, self._guarded)

    def _guarded(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with self._busy(), memory_errors():
                return compiled(*args)

        return call

    def _jit(self, fn: Callable[..., Any], donate: Sequence[int], name: str = "traced") -> Any:
        is_cpu = self.device.platform == "cpu"

        def traced(*args: Any) -> Any:
            # By default, a GPU multiplies float32 as TF32, which has 11 bits; a CPU keeps float32.
            with jax.default_matmul_precision(None if is_cpu else "highest"):
                return fn(*args)

        traced.__name__ = name
        options = CPU_OPTIONS if is_cpu else cuda.OPTIONS
        if self._shared:
            return self._shared.jit(traced, donate, options)
        return jax.jit(traced, donate_argnums=tuple(donate), compiler_options=options)

    def while_loop(
        self, condition: Callable[[Any], Array], body: Callable[[Any], Any], state: Any
    ) -> Any:
        return lax.while_loop(lambda s: condition(s)[0], body, state)

    def peak_memory_bytes(self) -> int | None:
        if self.device.platform == "cpu":
            return super().peak_memory_bytes()
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")

    def linear(self, x: Array, weight: Weight) -> Array:
        return self._linear(x, weight)

    def _linear(self, x: Array, weight: Weight, source: Source | None = None) -> Array:
        y = self._products(x.reshape(-1, x.shape[-1]), weight, source=source)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def rms_norm_linear(self, x: Array, norm: Array, eps: float, weight: Weight) -> Array:
        source = None if self._has_rowwise else Source("rms_norm", (x, norm), eps)
        return self._linear(self.rms_norm(x, norm, eps), weight, source)

    def swiglu_linear(self, gate_up: Array, weight: Weight) -> Array:
        source = None if self._has_rowwise else Source("swiglu", (gate_up,))
        return self._linear(self.swiglu(gate_up), weight, source)

    @property
    def _has_rowwise(self) -> bool:
        return self._kernels is not None and self._kernels.has_rowwise

    def expert_linear(self, x: Array, experts: Array, weight: Weight) -> Array:
        return self._products(x, weight, experts)

    def _products(
        self,
        x: Array,
        weight: Weight,
        experts: Array | None = None,
        source: Source | None = None,
    ) -> Array:
        is_share = isinstance(weight, Share)

        parts = weight.parts if is_share else weight
        prepared: Any = None
        if self._kernels is not None and any(isinstance(p, self._kernels.packed) for p in parts):
            prepared = self._kernels.prepared(x, source)

        def product(part: Any) -> Array:
            if self._kernels is not None and isinstance(part, self._kernels.packed):
                return self._kernels.linear(
                    prepared, part, experts, is_fast=self.options.fast_prefill
                )
            if experts is None:
                return expanded.product(x, part)
            return expanded.expert_product(x, experts, part)

        products = [product(part) for part in parts]
        y = products[0] if len(products) == 1 else jnp.concatenate(products, axis=-1)
        return weight.joined(y) if is_share else y

    def embedding(self, ids: Array, weight: Weight) -> Array:
        flat = ids.reshape(-1)
        start, values = 0, None
        for part in weight:
            index = jnp.clip(flat - start, 0, rows_of(part) - 1)
            found = self._rows(index, part)
            is_here = (flat >= start)[:, None]
            values = found if values is None else jnp.where(is_here, found, values)
            start += rows_of(part)
        assert values is not None
        return values.reshape(*ids.shape, -1)

    def _rows(self, index: Array, part: Any) -> Array:
        if self._kernels is not None and isinstance(part, self._kernels.packed):
            return self._kernels.rows(index, part)
        return expanded.rows(index, part)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        if self._kernels is None or not self._kernels.has_rowwise:
            return super().rms_norm(x, weight, eps)
        return self._kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).reshape(x.shape)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        if self._kernels is None or not self._kernels.has_rowwise:
            return super().layer_norm(x, weight, bias, eps)
        rows = x.reshape(-1, x.shape[-1])
        return self._kernels.layer_norm(rows, weight, bias, eps).reshape(x.shape)

    def swiglu(self, gate_up: Array) -> Array:
        if self._kernels is None or not self._kernels.has_rowwise:
            return super().swiglu(gate_up)
        y = self._kernels.swiglu(gate_up.reshape(-1, gate_up.shape[-1]))
        return y.reshape(*gate_up.shape[:-1], -1)

    # ---- cache -----------------------------------------------------------------------------
    # `k` and `v` hold rows. Rows of integers are multiples of `k_scale` and `v_scale`.

    def new_cache(self, batch: int, heads: int, capacity: int, head_dim: int) -> LayerCache:
        forms: dict[str, jax.ShapeDtypeStruct] = {}
        for name, row_type in zip(("k", "v"), rows_of_cache(self._cache_type), strict=True):
            shape = (batch, heads, capacity, width(row_type, head_dim))
            forms[name] = jax.ShapeDtypeStruct(shape, row_type.dtype)
            if row_type.scale_dtype is not None and row_type.group is None:
                scale_form = jax.ShapeDtypeStruct(shape[:3], row_type.scale_dtype)
                forms[f"{name}_scale"] = scale_form
        with memory_errors():
            if self._moves is not None and self._shared is None:
                with jax.default_device(self.device):
                    arrays = self._moves.new_cache(list(forms.values()))
                return dict(zip(forms, arrays, strict=True))
            cache: LayerCache = {} if self._shared is None else ShardedCache()
            cache.update(zip(forms, self._zeros(list(forms.values())), strict=True))
            return cache

    def _zeros(self, forms: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
        """Make arrays of zeros. Forms are those of one device's share where devices share."""
        if self._shared is not None:
            return self._shared.zeros(forms)
        return zeros(tuple(forms), SingleDeviceSharding(self.device))()

    @property
    def _moves(self) -> OwnKernels | None:
        """Return the kernels, if they can move the rows of a cache."""
        has_moves = self._kernels is not None and self._kernels.has_moves(self._cache_type)
        return self._kernels if has_moves else None

    def shift_cache(self, cache: LayerCache, count: Array) -> LayerCache:
        def shift(a: Array, count: Array) -> Array:  # one sequence, (K, S, ...)
            return lax.dynamic_slice_in_dim(jnp.concatenate([a, a], axis=1), count, a.shape[1], 1)

        return type(cache)({name: jax.vmap(shift)(a, count) for name, a in cache.items()})

    def copy_rows(self, cache: LayerCache, rows: Array, slots: Array, capacity: int) -> LayerCache:
        form = (rows.shape, *(a.shape for a in cache.values()))
        with memory_errors():
            return self._copier(capacity, form)(cache, rows, slots)

    def _new_copier(self, capacity: int, form: object) -> Callable[..., LayerCache]:
        """Return a function for arguments of one form. JAX would hold a program for each other."""
        return self.compile(partial(self._copied, capacity))

    def _copied(self, capacity: int, cache: LayerCache, rows: Array, slots: Array) -> LayerCache:
        if self._moves is not None:
            names, arrays = tuple(cache), list(cache.values())
            new = self._moves.copy_rows(arrays, rows, slots, capacity)
            return type(cache)(zip(names, new, strict=True))

        def copied(a: Array) -> Array:  # XLA's gather would copy number by number on a CPU
            a = a[:, :, :capacity]
            chosen = [lax.dynamic_index_in_dim(a, rows[i], axis=0) for i in range(rows.shape[0])]
            return self._with_slots(jnp.concatenate(chosen, axis=0), capacity)

        return type(cache)({name: copied(a) for name, a in cache.items()})

    def insert_row(
        self, cache: LayerCache, row: LayerCache, index: Array, slots: Array
    ) -> LayerCache:
        if self._moves is not None:
            names, arrays = tuple(cache), list(cache.values())
            own = [row[name] for name in names]
            new = self._moves.insert_row(arrays, own, index, slots)
            return type(cache)(zip(names, new, strict=True))

        def put(a: Array, new: Array) -> Array:
            new = self._with_slots(new, a.shape[2])
            return lax.dynamic_update_slice_in_dim(a, new, index[0], axis=0)

        return type(cache)({name: put(a, row[name]) for name, a in cache.items()})

    def update_cache(self, cache: LayerCache, k: Array, v: Array, slots: Array) -> LayerCache:
        names = [n for n in ("k", "k_scale", "v", "v_scale") if n in cache]
        old = [cache[name] for name in names]
        if self._kernels is not None and self._kernels.has_cache(self._cache_type, *k.shape[2:]):
            stored = self._kernels.store(k, v, slots, self._cache_type, old)
        else:
            pairs = zip((k, v), rows_of_cache(self._cache_type), strict=True)
            new = [part for x, row_type in pairs for part in as_stored(x, row_type)]
            start = slots[:, 0]
            stored = [put(o, n, start) for o, n in zip(old, new, strict=True)]
        return type(cache)(zip(names, stored, strict=True))

    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        scales = [cache[n] for n in ("k_scale", "v_scale") if n in cache]
        if self._kernels is not None and self._kernels.has_cache(self._cache_type, *q.shape[2:]):
            arrays = (cache["k"], cache["v"], *scales)
            return self._kernels.attention(q * scale, slots, window, self._cache_type, *arrays)
        pairs = zip(("k", "v"), rows_of_cache(self._cache_type), strict=True)
        numbers = {n: as_numbers(cache[n], cache.get(f"{n}_scale"), t) for n, t in pairs}

        def default(q: Array, numbers: LayerCache, slots: Array) -> Array:
            with jax.default_matmul_precision(self._attention_precision):
                return super(JaxBackend, self).attention(q, numbers, slots, scale, window)

        tokens = q.shape[2]
        if tokens <= QUERIES or tokens % QUERIES:
            return default(q, numbers, slots)

        def some(start: Array) -> Array:
            part = lax.dynamic_slice_in_dim(q, start, QUERIES, axis=2)
            at = lax.dynamic_slice_in_dim(slots, start, QUERIES, axis=1)
            return default(part, numbers, at)

        parts = lax.map(some, jnp.arange(0, tokens, QUERIES, dtype=jnp.int32))  # (n, B, H, ., D)
        return jnp.moveaxis(parts, 0, 2).reshape(q.shape)

    @property
    def _attention_precision(self) -> str | None:
        """Precision of the matrix products of attention where XLA computes it.

        Tensor cores multiply a float32 number as two of bfloat16, or, with `fast_prefill`, as one
        of TF32, which has 11 bits.
        """
        if self.device.platform == "cpu":
            return None
        if float(self.device.compute_capability) < 8:  # GPUs before Ampere have neither
            return "highest"
        return "TF32_TF32_F32" if self.options.fast_prefill else "BF16_BF16_F32_X3"

    def contains(self, ids: Array, size: int) -> Array:
        ids = jnp.where(ids < 0, size, ids)  # a negative index would count from the end
        found = jnp.zeros((ids.shape[0], size), bool)
        return found.at[jnp.arange(ids.shape[0])[:, None], ids].set(True, mode="drop")

    def uniforms(self, key: Array, step: Array, size: int) -> Array:
        if self._kernels is not None and self._kernels.has_uniforms:
            return self._kernels.uniforms(key, step, size)
        # A loop, since XLA takes a minute to compile the rounds one after the other on a CPU.
        state = philox.begin(jnp, key, step, size)
        state = lax.fori_loop(0, philox.ROUNDS, lambda _, s: philox.next_round(jnp, s), state)
        return philox.numbers(jnp, state, size)

    def largest(self, x: Array, counts: Array, total: Array) -> Array:
        keys = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)  # sorted like the distances to 0
        return jax.vmap(_nearest)(keys, counts, total)


def _nearest(keys: Array, counts: Array, total: Array) -> Array:
    """Compute `largest` for one row; `keys` are the bits of the distances to 0.

    Three histograms find the bound's highest 11 bits, the next 10 and the last 10.
    """

    def digit(i: Array, bound: Array) -> Array:
        shift = 20 - 10 * i
        digits = jnp.clip((keys - bound) >> shift, 0, 2048)  # 2048 is out of range, and dropped
        held = jnp.zeros(2048, jnp.int32).at[digits].add(counts, mode="drop")
        below = jnp.sum((jnp.cumsum(held) < total).astype(jnp.int32))
        return bound + (jnp.minimum(below, (2**31 - 1 - bound) >> shift) << shift)

    return keys <= lax.fori_loop(0, 3, digit, jnp.int32(0))
