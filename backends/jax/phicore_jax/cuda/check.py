"""Tests of the GPU kernels on the GPU at hand, run once before the kernels are used.

There are many versions of drivers and of XLA, and a wrong kernel would produce wrong text. A trial
runs kernels inside a loop and compiles them with the options of the engine's steps, which are not
XLA's defaults. Products of a quantization type are tried when a file first has that type, since
compiling those of all types would take long.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Type

from phicore.backend import cache_types, philox
from phicore.errors import BackendError
from phicore.gguf.random_models import random_matrix
from phicore.gguf.reader import GGUFTensor
from phicore_jax.cuda import OPTIONS
from phicore_jax.cuda.attention import CACHE_TYPES
from phicore_jax.cuda.runtime import CudaKernels
from phicore_jax.own import OwnKernels, Source

Array = Any
Caches = dict[str, dict[str, Array]]


class Given(NamedTuple):
    """The inputs of one run of a trial.

    Attributes:
        i: Number of the run, from 0.
        x: Rows of activations.
        weight: A packed matrix.
        qkv: Queries, keys and values, (3, B, H, S, D); the keys and values use K of the H heads.
        caches: A filled cache for each cache type; only `try_others` has caches.
    """

    i: Array
    x: Array
    weight: Any
    qkv: Array
    caches: Caches


Trial = Callable[[OwnKernels, Given], tuple[list[Array], Caches]]

ROWS, COLUMNS = 35, 1280  # an odd number of rows; 40 groups a row leave some lanes idle
EXPERTS = 5  # with 7 rows each
BATCH, HEADS, KV_HEADS, CAPACITY, DIM = 2, 4, 2, 1024, 96  # `Shape.splits` is 64
NUMBERS = 1003  # random numbers, not a multiple of a block
BOUND = 1e-3


class TriedKernels(CudaKernels):
    """The kernels of one GPU. XLA computes the products of types whose kernels are wrong on it."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def has_type(self, ggml_type: Type) -> bool:
        return super().has_type(ggml_type) and fault(self._device, ggml_type) is None

    def has_experts(self, ggml_type: Type) -> bool:
        is_there = self.has_type(ggml_type)
        return is_there and fault(self._device, ggml_type, of_experts=True) is None


@cache
def fault(device: Any, ggml_type: Type | None = None, *, of_experts: bool = False) -> str | None:
    """Try kernels on a device: return what is wrong with them, or None if they work.

    A fault is also logged as a warning, since the user would otherwise notice only the slowness.

    Args:
        ggml_type: Try the products of this type. None tries all other kernels: those for
            activations of norms and gates, for storing into caches, and for attention.
        of_experts: Try the products of the type's expert matrices instead of its plain products.
    Raises:
        BackendError: If the device does not work any more after the trial.
    """
    trial: Trial = try_others
    if ggml_type is not None:
        trial = try_experts if of_experts else try_products
    if (found := _fault(device, trial, ggml_type or Type.Q8_0)) is not None:
        found = f"they do not work with this GPU: {found}"
        which = "CUDA kernels" if ggml_type is None else f"CUDA kernels for {ggml_type.name}"
        logging.getLogger("phicore_jax").warning("%s: %s; XLA computes instead", which, found)
    return found


def _fault(device: Any, trial: Trial, ggml_type: Type) -> str | None:
    options = {} if device.platform == "cpu" else OPTIONS
    try:
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            worst = float(program(trial, options)(*operands(ggml_type)))
    except Exception as error:  # noqa: BLE001 - XLA, LLVM and the driver raise various types
        _check_alive(device)
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None if worst < BOUND else f"wrong results, by {worst:.1e}"


def _check_alive(device: Any) -> None:
    """Raise a BackendError if the device does not work any more.

    After an invalid memory access, a GPU refuses all further work of the process.
    """
    try:
        jax.block_until_ready(jax.device_put(np.ones(8, np.float32), device) + 1.0)
    except Exception as error:
        raise BackendError(
            "jax: the GPU stopped when CUDA kernels were tried; start again with PHICORE_KERNELS=0"
        ) from error


def operands(ggml_type: Type) -> tuple[Any, ...]:
    """Return the arguments of `program`'s function, with a weight of this type.

    They are the number of runs, activations (9, COLUMNS), queries, keys and values
    (3, B, H, S, D), and the packed weight (ROWS, COLUMNS).
    """
    rng = np.random.Generator(np.random.PCG64(1))
    data = random_matrix(ggml_type, ROWS, COLUMNS, rng, 0.05).view(np.uint8)
    weight = CudaKernels().pack([GGUFTensor("weight", ggml_type, (ROWS, COLUMNS), data)])
    x = rng.standard_normal((9, COLUMNS)).astype(np.float32)
    qkv = rng.standard_normal((3, BATCH, HEADS, CAPACITY, DIM)).astype(np.float32)
    return np.int32(2), x, qkv, weight


def program(trial: Trial, options: dict[str, Any]) -> Any:
    """Return a jitted function that runs a trial on `operands` and returns the largest error."""
    return jax.jit(partial(_worst, trial, CudaKernels()), compiler_options=options)


def _worst(
    trial: Trial, kernels: OwnKernels, count: Array, x: Array, qkv: Array, weight: Any
) -> Array:
    """Run a trial `count` times, passing the caches on, and return the largest error."""
    caches = {name: _cache(name, qkv) for name in CACHE_TYPES} if trial is try_others else {}

    def run(state: tuple[Array, Array, Caches]) -> tuple[Array, Array, Caches]:
        i, worst, caches = state
        shifted = x + 1e-3 * i.astype(jnp.float32)  # so that the runs differ
        errors, caches = trial(kernels, Given(i, shifted, weight, qkv, caches))
        return i + 1, jnp.maximum(worst, jnp.max(jnp.stack(errors))), caches

    first = (count * 0, jnp.float32(0), caches)
    return jax.lax.while_loop(lambda state: state[0] < count, run, first)[1]


# ---- trials: each returns the relative errors of a run, and the updated caches -------------------


def try_products(kernels: OwnKernels, given: Given) -> tuple[list[Array], Caches]:
    """Try products with 1, 3, 8 and 9 rows of activations."""
    found, x, w = [], given.x, given.weight
    values = w.dense()
    for rows in (x[:1], x[:3], x[:8], x):
        for is_fast in (False, True) if len(rows) > 8 else (False,):
            y = kernels.linear(kernels.prepared(rows, None), w, is_fast=is_fast)
            found.append(_distance(y, rows @ values.T))
    return found, given.caches


def try_experts(kernels: OwnKernels, given: Given) -> tuple[list[Array], Caches]:
    """Try products of 2 and of 9 rows in which each row has an expert's matrix."""
    found, x, w = [], given.x, given.weight
    experts = jnp.array([4, 0, 3, 3, 1, 4, 0, 0, 2], jnp.int32)
    several = replace(w, count=EXPERTS)
    matrices = w.dense().reshape(EXPERTS, -1, COLUMNS)
    for count in (2, 9):
        y = kernels.linear(kernels.prepared(x[:count], None), several, experts[:count])
        expected = jnp.einsum("mk,mnk->mn", x[:count], matrices[experts[:count]])
        found.append(_distance(y, expected))
    return found, given.caches


def try_others(kernels: OwnKernels, given: Given) -> tuple[list[Array], Caches]:
    """Try products of RMSNorm's and SwiGLU's results, random numbers, caches, and attention."""
    found, x, w = [], given.x, given.weight
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
    found.append(_try_uniforms(kernels, given.i))
    caches = {}
    for cache_type in CACHE_TYPES:
        error, caches[cache_type] = _try_attention(kernels, cache_type, given)
        found.append(error)
    return found, caches


def _try_uniforms(kernels: OwnKernels, i: Array) -> Array:
    """Make random numbers of three rows; return 1 if a bit is wrong, else 0."""
    key = jnp.array([[1, 0], [0xFFFFFFFF, 0xFFFFFFFF], [5, 7]], jnp.uint32)
    step = jnp.array([0, 3, 100_000], jnp.uint32) + i.astype(jnp.uint32)
    state = philox.begin(jnp, key, step, NUMBERS)
    state = jax.lax.fori_loop(0, philox.ROUNDS, lambda _, s: philox.next_round(jnp, s), state)
    expected = philox.numbers(jnp, state, NUMBERS)
    return jnp.any(kernels.uniforms(key, step, NUMBERS) != expected).astype(jnp.float32)


def _cache(cache_type: str, qkv: Array) -> dict[str, Array]:
    return cache_types.stored(jnp, qkv[1][:, :KV_HEADS], qkv[2][:, :KV_HEADS], cache_type)


def _try_attention(
    kernels: OwnKernels, cache_type: str, given: Given
) -> tuple[Array, dict[str, Array]]:
    """Store token i of two sequences, and return the error of its attention, and the cache.

    One of the sequences is longer than the window.
    """
    i, qkv, stored = given.i, given.qkv, given.caches[cache_type]
    first = jnp.array([[7], [900]], jnp.int32)
    positions, window = first + i, 700
    new = jnp.full((BATCH, KV_HEADS, 1, DIM), 3.0, jnp.float32) + i.astype(jnp.float32)
    names = [n for n in ("k", "k_scale", "v", "v_scale") if n in stored]
    planes = kernels.store(new, new, positions, cache_type, [stored[n] for n in names])
    cache = dict(zip(names, planes, strict=True))
    scales = [cache[n] for n in ("k_scale", "v_scale") if n in cache]
    q = qkv[0][:, :, :1] * DIM**-0.5
    y = kernels.attention(q, positions, window, cache_type, cache["k"], cache["v"], *scales)

    group = HEADS // KV_HEADS
    j = jnp.arange(CAPACITY, dtype=jnp.int32).reshape(1, 1, -1, 1)
    begin, at = first[:, :, None, None], positions[:, :, None, None]
    rows = 3.0 + (j - begin).astype(jnp.float32)
    k, v = (
        jnp.repeat(jnp.where((j >= begin) & (j <= at), rows, a[:, :KV_HEADS]), group, axis=1)
        for a in qkv[1:]
    )
    scores = q @ k.swapaxes(2, 3)  # (B, H, 1, S)
    j = j.reshape(1, 1, 1, -1)
    scores = jnp.where((j <= at) & (j > at - window), scores, -jnp.inf)
    return _distance(y, jax.nn.softmax(scores, axis=-1) @ v), cache


def _distance(y: Array, expected: Array) -> Array:
    return jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)
