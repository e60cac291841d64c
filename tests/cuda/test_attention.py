"""Tests of the GPU kernels of the cache and attention, run on the CPU, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from phicore.backend import cache_types
from phicore.testing.compare import assert_close

pytest.importorskip("jax", reason="install phicore-jax")
pytest.importorskip("llvmlite", reason="install llvmlite, for the kernels of JAX")

from cuda.host import run
from phicore_jax.cuda.attention import (
    CACHE_TYPES,
    Shape,
    emit_attention,
    emit_combine,
    emit_store,
)
from phicore_jax.cuda.ptx import ptx

rng = np.random.default_rng


@pytest.fixture(params=CACHE_TYPES)
def cache_type(request: pytest.FixtureRequest) -> str:
    return request.param


def random(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return rng(seed).standard_normal(shape).astype(np.float32)


def filled(shape: Shape, k: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
    """Store keys and values (B, K, S, D) as the arrays of a cache that the kernels take."""
    stored = cache_types.stored(np, k, v, shape.cache_type)
    return [np.array(stored[n]) for n in ("k", "k_scale", "v", "v_scale") if n in stored]


def empty(shape: Shape) -> list[np.ndarray]:
    zeros = np.zeros((shape.batch, shape.kv_heads, shape.capacity, shape.dim), np.float32)
    return filled(shape, zeros, zeros)


def planes_by_name(shape: Shape, planes: list[np.ndarray]) -> dict[str, np.ndarray]:
    names = ("k", "k_scale", "v", "v_scale") if shape.cache_type == "i16" else ("k", "v")
    return dict(zip(names, planes, strict=True))


def attention(
    shape: Shape,
    q: np.ndarray,
    positions: np.ndarray,
    cache: list[np.ndarray],
    window: int | None = None,
) -> np.ndarray:
    heads = shape.batch * shape.heads
    results = [((heads, shape.splits, n), np.float32) for n in (shape.dim, 2)]
    parts = run(
        emit_attention,
        (shape, window),
        [q * np.float32(shape.dim**-0.5), positions, *cache],
        results,
        heads * shape.splits,
    )
    (y,) = run(emit_combine, (shape,), parts, [(q.shape, np.float32)], shape.combining_warps)
    return y


def expected(
    shape: Shape,
    q: np.ndarray,
    positions: np.ndarray,
    cache: list[np.ndarray],
    window: int | None = None,
) -> np.ndarray:
    k, v = cache_types.numbers(np, planes_by_name(shape, cache))
    y = np.empty(q.shape)
    for b in range(shape.batch):
        last = positions[b]
        first = 0 if window is None else max(0, last - window + 1)
        for h in range(shape.heads):
            head = h // (shape.heads // shape.kv_heads)
            seen = slice(first, last + 1)
            scores = k[b, head, seen].astype(float) @ q[b, h] * shape.dim**-0.5
            weights = np.exp(scores - scores.max())
            y[b, h] = weights / weights.sum() @ v[b, head, seen]
    return y


@pytest.mark.complete
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "capacity", "dim", "positions", "window"),
    [
        (1, 2, 2, 256, 96, [0], None),
        (1, 2, 2, 256, 96, [200], None),
        (2, 4, 2, 256, 64, [255, 16], None),
        (1, 6, 2, 512, 128, [300], 100),
        (3, 1, 1, 256, 32, [5, 8, 100], 6),
        (1, 1, 1, 2048, 32, [1999], None),
    ],
)
def test_attention_is_that_of_float64(
    cache_type: str,
    batch: int,
    heads: int,
    kv_heads: int,
    capacity: int,
    dim: int,
    positions: list[int],
    window: int | None,
):
    shape = Shape(batch, heads, kv_heads, capacity, dim, cache_type)
    rows = (batch, kv_heads, capacity, dim)
    cache = filled(shape, random(rows, 1), random(rows, 2))
    q, at = 3 * random((batch, heads, dim), 3), np.array(positions, np.int32)
    y = attention(shape, q, at, cache, window)
    assert_close(y, expected(shape, q, at, cache, window), 2e-6)


def test_what_is_not_seen_has_no_influence(cache_type: str):
    shape = Shape(1, 2, 1, 256, 64, cache_type)
    rows = (1, 1, 256, 64)
    q, at = random((1, 2, 64), 3), np.array([77], np.int32)
    k, v = random(rows, 1), random(rows, 2)
    once = attention(shape, q, at, filled(shape, k, v), 20)
    for other in (k, v):
        other[:, :, :58], other[:, :, 78:] = 1e4, -1e4
    assert np.array_equal(attention(shape, q, at, filled(shape, k, v), 20), once)


def test_large_scores_do_not_overflow(cache_type: str):
    shape = Shape(1, 1, 1, 256, 32, cache_type)
    rows = (1, 1, 256, 32)
    cache = filled(shape, 100 * random(rows, 1), random(rows, 2))
    q, at = 100 * random((1, 1, 32), 3), np.array([255], np.int32)
    y = attention(shape, q, at, cache)
    assert_close(y, expected(shape, q, at, cache), 1e-4)


def test_numbers_that_are_not_finite_stay_in_their_head(cache_type: str):
    shape = Shape(1, 2, 2, 256, 32, cache_type)
    rows = (1, 2, 256, 32)
    k, v = random(rows, 1), random(rows, 2)
    k[0, 1, 3, 5] = np.nan
    at = np.array([40], np.int32)
    with np.errstate(invalid="ignore"):
        y = attention(shape, random((1, 2, 32), 3), at, filled(shape, k, v))
    assert np.isfinite(y[0, 0]).all()
    assert np.isnan(y[0, 1]).all()


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e3])
def test_rows_are_stored_as_the_types_say(cache_type: str, size: float):
    shape = Shape(2, 3, 3, 16, 96, cache_type)
    k, v = (size * random((2, 3, 96), seed) for seed in (1, 2))
    positions = np.array([4, 15], np.int32)
    cache = [np.full_like(a, 7) for a in empty(shape)]
    run(emit_store, (shape,), [k, v, positions, *cache], [], 2 * 6)
    new = filled(shape, k[:, :, None], v[:, :, None])
    for a, row in zip(cache, new, strict=True):
        assert a.dtype == row.dtype
        for b, at in enumerate(positions):
            assert np.array_equal(a[b, :, at], row[b, :, 0])
            others = np.arange(16) != at
            assert (a[b][:, others] == 7).all()


def test_what_is_not_finite_is_not_stored_as_numbers():
    shape = Shape(1, 2, 2, 4, 32, "i16")
    k, v = random((1, 2, 32), 1), random((1, 2, 32), 2)
    k[0, 0, 3], v[0, 1, 31] = np.nan, -np.inf
    cache = empty(shape)
    run(emit_store, (shape,), [k, v, np.zeros(1, np.int32), *cache], [], 4)
    stored_k, stored_v = cache_types.numbers(np, planes_by_name(shape, cache))
    assert np.isnan(stored_k[0, 0, 0]).all()
    assert np.isfinite(stored_k[0, 1, 0]).all()
    assert np.isfinite(stored_v[0, 0, 0]).all()
    assert np.isnan(stored_v[0, 1, 0]).all()


def test_ptx_is_written_for_every_type(cache_type: str):
    shape = Shape(1, 32, 32, 4096, 96, cache_type)
    planes = 4 if cache_type == "i16" else 2
    text = ptx(emit_attention, (shape, 2047), 2 + planes + 2)
    assert "ld.global.nc.v4" in text
    assert "ld.local" not in text
    for emit, pointers in ((emit_store, 3 + planes), (emit_combine, 3)):
        assert "ld.local" not in ptx(emit, (shape,), pointers)


def test_positions_are_dealt_out_to_many_warps():
    assert Shape(1, 32, 32, 4096, 96, "i16").splits == 64
    assert Shape(8, 32, 32, 4096, 96, "i16").splits == 8
    assert Shape(1, 32, 32, 256, 96, "i16").splits == 16
    assert Shape(64, 40, 10, 4096, 128, "i16").splits == 1
