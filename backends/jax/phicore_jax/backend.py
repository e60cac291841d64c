"""The tensor protocol on JAX.

Weights stay quantized on the device and are expanded inside `linear` (see `linear.py`). The rest is
the protocol's defaults, fused by XLA; the cache is updated in place through buffer donation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import platformdirs

from phicore.errors import BackendError
from phicore.gguf.matrix import Matrix
from phicore.protocol import Array, Backend, LayerCache, Weight
from phicore_jax import linear

# XLA's other orders compute whatever does not depend on the input first: here every expanded weight
# of the model, all alive at once. In this order memory stays small and warm, and prefill takes half
# the time.
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def device_names() -> list[str]:
    """The devices of this machine that JAX can use: `cpu`, `cuda`, `cuda:1`, ..."""
    return ["cpu", *(_name(device) for device in _cuda_devices())]


def _cuda_devices() -> list[Any]:
    try:
        return jax.devices("cuda")
    except RuntimeError:  # no CUDA plugin, or no card
        return []


def _name(device: Any) -> str:
    return f"cuda:{device.id}" if device.id else "cuda"


def find_device(name: str | None) -> Any:
    """The JAX device of a name, or the fastest one for None.

    Raises:
        BackendError: If there is no such device; the message lists those there are.
    """
    if name is None:
        cards = _cuda_devices()
        return cards[0] if cards else jax.devices("cpu")[0]
    if name == "cpu":
        return jax.devices("cpu")[0]
    for device in _cuda_devices():
        if name in (_name(device), f"cuda:{device.id}"):
            return device
    hint = "; for NVIDIA cards install phicore-jax[cuda]" if name.startswith("cuda") else ""
    raise BackendError(
        f"backend jax: no device {name!r} (available: {', '.join(device_names())}){hint}"
    )


def keep_compiled_programs() -> None:
    """Let XLA keep what it compiles on disk, so that the second start loads it instead.

    This sets JAX's configuration for the process, unless the user has chosen a folder already
    (JAX_COMPILATION_CACHE_DIR, or jax.config) or the usual one cannot be written.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = platformdirs.user_cache_path("phicore") / f"jax-{jax.__version__}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn XLA's report that memory is out, in whatever exception it comes, into a line."""
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


class JaxBackend(Backend):
    """JAX on one device."""

    xp = jnp
    compiles = True
    asynchronous = True

    def __init__(self, device: str | None = None) -> None:
        self.device = find_device(device)
        keep_compiled_programs()

    def asarray(self, x: np.ndarray) -> Array:
        return self._put(np.array(x))

    def _put(self, x: np.ndarray) -> Array:
        """Like `asarray`, of an array that nobody else holds: JAX may share its memory."""
        with memory_errors():
            return jax.device_put(x, self.device)

    def to_numpy(self, x: Array) -> np.ndarray:
        with memory_errors():
            return np.asarray(x)

    def load_weight(self, matrix: Matrix) -> Weight:
        return jax.tree.map(self._put, linear.pack(matrix))

    def compile(self, fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        is_cpu = self.device.platform == "cpu"

        def traced(*args: Any) -> Any:
            # A GPU would multiply float32 with the 11 bits of TF32; a CPU multiplies it as it is.
            with jax.default_matmul_precision(None if is_cpu else "highest"):
                return fn(*args)

        options = CPU_OPTIONS if is_cpu else {}
        compiled = jax.jit(traced, donate_argnums=tuple(donate), compiler_options=options)

        def call(*args: Any) -> Any:
            with memory_errors():
                return compiled(*args)

        return call

    def peak_memory_bytes(self) -> int | None:
        if self.device.platform == "cpu":
            return super().peak_memory_bytes()
        return (self.device.memory_stats() or {}).get("peak_bytes_in_use")

    def linear(self, x: Array, weight: Weight) -> Array:
        return linear.linear(x, weight)

    def embedding(self, ids: Array, weight: Weight) -> Array:
        return linear.rows(ids, weight)

    def new_cache(self, batch: int, heads: int, capacity: int, head_dim: int) -> LayerCache:
        shape = (batch, heads, capacity, head_dim)
        return {name: self._put(np.zeros(shape, np.float32)) for name in ("k", "v")}

    def grow_cache(self, cache: LayerCache, capacity: int) -> LayerCache:
        with memory_errors():
            return super().grow_cache(cache, capacity)

    def update_cache(self, cache: LayerCache, k: Array, v: Array, positions: Array) -> LayerCache:
        def put(old: Array, new: Array, position: Array) -> Array:  # one sequence: (K, S, D)
            return jax.lax.dynamic_update_slice(old, new, (0, position, 0))

        start = positions[:, 0]
        if start.shape[0] == 1:  # under vmap it would become a scatter, which XLA:CPU does by loops
            return {
                "k": put(cache["k"][0], k[0], start[0])[None],
                "v": put(cache["v"][0], v[0], start[0])[None],
            }
        return {
            "k": jax.vmap(put)(cache["k"], k, start),
            "v": jax.vmap(put)(cache["v"], v, start),
        }

    def contains(self, ids: Array, size: int) -> Array:
        ids = jnp.where(ids < 0, size, ids)  # a negative index would count from the end
        found = jnp.zeros((ids.shape[0], size), bool)
        return found.at[jnp.arange(ids.shape[0])[:, None], ids].set(True, mode="drop")
