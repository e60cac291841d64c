"""Whether the kernels compute on a card what they should: tried once, before they are used.

Drivers and XLA's versions are many, and a kernel that is wrong would give wrong text. They run in a
loop, and compiled with the options that steps have, which are not XLA's default. Products are tried
for each type of quantization when a file has it: compiling all of them would take long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Type

from phicore import kv_cache
from phicore.gguf.reader import GGUFTensor
from phicore.testing.tiny_models import random_matrix
from phicore_jax.cuda import OPTIONS
from phicore_jax.cuda.attention import CACHE_TYPES
from phicore_jax.cuda.runtime import CudaKernels
from phicore_jax.own import OwnKernels, Source

Array = Any

ROWS, COLUMNS = 35, 1280  # an odd number, and lanes with nothing to do
EXPERTS = 5  # of 7 rows
BATCH, HEADS, KV_HEADS, CAPACITY, DIM = 2, 4, 2, 1024, 96  # 64 splits
BOUND = 1e-3


class TriedKernels(CudaKernels):
    """Those of a card: types whose products are wrong there are not among them."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def has_type(self, ggml_type: Type) -> bool:
        return super().has_type(ggml_type) and fault(self._device, ggml_type) is None

    has_experts = has_type


@cache
def fault(device: Any, ggml_type: Type | None = None) -> str | None:
    """What is wrong with the kernels for a type, or with all others; None if nothing is.

    It is logged as a warning, since a user would only find that all is slow.
    """
    if (found := _fault(device, ggml_type)) is not None:
        found = f"they do not work with this card: {found}"
        which = "CUDA kernels" if ggml_type is None else f"CUDA kernels for {ggml_type.name}"
        logging.getLogger("phicore_jax").warning("%s: %s; XLA computes instead", which, found)
    return found


def _fault(device: Any, ggml_type: Type | None) -> str | None:
    kernels = CudaKernels()
    rng = np.random.Generator(np.random.PCG64(1))
    try:
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            operands = [_weight(kernels, ggml_type or Type.Q8_0, rng)]
            x = rng.standard_normal((9, COLUMNS)).astype(np.float32)
            errors: Callable[..., Array] = _errors_of_products
            if ggml_type is None:
                errors = _errors
                qkv = rng.standard_normal((3, BATCH, HEADS, CAPACITY, DIM)).astype(np.float32)
                operands.append(qkv)
            options = {} if device.platform == "cpu" else OPTIONS
            worst_of_all = jax.jit(
                partial(_worst, partial(errors, kernels)), compiler_options=options
            )
            worst = float(worst_of_all(np.int32(2), x, *operands))
    except Exception as error:  # noqa: BLE001 - whatever XLA, LLVM or the driver say
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None if worst < BOUND else f"wrong results, by {worst:.1e}"


def _weight(kernels: OwnKernels, ggml_type: Type, rng: np.random.Generator) -> Any:
    data = random_matrix(ggml_type, ROWS, COLUMNS, rng, 0.05).view(np.uint8)
    return kernels.pack([GGUFTensor("weight", ggml_type, (ROWS, COLUMNS), data)])


def _worst(errors: Callable[..., Array], count: Array, x: Array, *operands: Any) -> Array:
    """The largest error of so many runs."""

    def run(state: tuple[Array, Array]) -> tuple[Array, Array]:
        i, worst = state
        shift = 1e-3 * i.astype(jnp.float32)  # so that no run is like another
        return i + 1, jnp.maximum(worst, jnp.max(errors(x + shift, *operands)))

    first = (count * 0, jnp.float32(0))
    return jax.lax.while_loop(lambda state: state[0] < count, run, first)[1]


def _errors_of_products(kernels: OwnKernels, x: Array, w: Any) -> Array:
    """Relative ones, with one row, some and many; and where each row has its own matrix."""
    found = []
    values = w.dense()
    for rows in (x[:1], x[:3], x):
        for is_fast in (False, True) if len(rows) > 8 else (False,):
            y = kernels.linear(kernels.prepared(rows, None), w, is_fast=is_fast)
            found.append(_distance(y, rows @ values.T))
    experts = jnp.array([4, 0, 3, 3, 1, 4, 0, 0, 2], jnp.int32)
    several = replace(w, count=EXPERTS)
    matrices = values.reshape(EXPERTS, -1, COLUMNS)
    for count in (2, 9):
        y = kernels.linear(kernels.prepared(x[:count], None), several, experts[:count])
        expected = jnp.einsum("mk,mnk->mn", x[:count], matrices[experts[:count]])
        found.append(_distance(y, expected))
    return jnp.stack(found)


def _errors(kernels: OwnKernels, x: Array, w: Any, qkv: Array) -> Array:
    """Those of a norm's and a gate's result, and of attention."""
    found = []
    scale, eps = jnp.linspace(0.5, 1.5, COLUMNS, dtype=jnp.float32), 1e-5
    root = jnp.sqrt(jnp.mean(x[:1] ** 2, axis=1, keepdims=True) + eps)
    gate_up = jnp.concatenate([x[:1], x[1:2]], axis=1)
    made = [
        (x[:1] / root * scale.reshape(1, -1), Source("rms_norm", (x[:1], scale), eps)),
        (jax.nn.silu(x[:1]) * x[1:2], Source("swiglu", (gate_up,))),
    ]
    for rows, source in made:
        y = kernels.linear(kernels.prepared(rows, source), w)
        found.append(_distance(y, rows @ w.dense().T))
    for cache_type in CACHE_TYPES:
        found.append(_attention_error(kernels, cache_type, *qkv))
    return jnp.stack(found)


def _attention_error(kernels: OwnKernels, cache_type: str, q: Array, k: Array, v: Array) -> Array:
    """Of a token whose row is stored first, in two sequences, one longer than the window."""
    k, v, window = k[:, :KV_HEADS], v[:, :KV_HEADS], 700
    stored = kv_cache.stored(jnp, k, v, cache_type)
    positions = jnp.array([[7], [900]], jnp.int32)
    at = positions[:, :, None, None]
    k, v = (a.at[jnp.arange(BATCH), :, positions[:, 0]].set(3.0) for a in (k, v))
    new = jnp.full((BATCH, KV_HEADS, 1, DIM), 3.0, jnp.float32)
    names = [n for n in ("k", "k_scale", "v", "v_scale") if n in stored]
    planes = kernels.store(new, new, positions, cache_type, [stored[n] for n in names])
    cache = dict(zip(names, planes, strict=True))
    scales = [cache[n] for n in ("k_scale", "v_scale") if n in cache]
    q = q[:, :, :1] * DIM**-0.5
    y = kernels.attention(q, positions, window, cache_type, cache["k"], cache["v"], *scales)
    group = HEADS // KV_HEADS
    scores = q @ jnp.repeat(k, group, axis=1).swapaxes(2, 3)  # (B, H, 1, S)
    j = jnp.arange(CAPACITY).reshape(1, 1, 1, -1)
    scores = jnp.where((j <= at) & (j > at - window), scores, -jnp.inf)
    return _distance(y, jax.nn.softmax(scores, axis=-1) @ jnp.repeat(v, group, axis=1))


def _distance(y: Array, expected: Array) -> Array:
    return jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)
