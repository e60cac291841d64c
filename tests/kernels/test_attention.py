"""Tests of attention's bits: a token has the same alone and in a chunk, wherever its slots are."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phicore_jax.backend import JaxBackend
from phicore_jax.cache import ROW_TYPES
from phicore_jax.kernels.attention import BLOCK
from phicore_jax.kernels.runtime import Kernels

from phicore.backend import BackendOptions, LayerCache

DIMS = (64, 80, 96, 100, 128, 8, 24)
KV_HEADS = 2
EXAMPLES = 10  # each compiles several kernels


class Text:
    """The queries, keys and values of a text of random numbers, and a cache that holds it."""

    def __init__(
        self, kernels: Kernels, cache_type: str, dim: int, group: int, window: int | None, n: int
    ) -> None:
        options = BackendOptions(device="cpu", cache_type=cache_type)
        self.ops = ops = JaxBackend(options, kernels=kernels)
        rng = np.random.default_rng(0)
        self.k, self.v = (rng.standard_normal((1, KV_HEADS, n, dim), np.float32) for _ in range(2))
        self.q = 3 * rng.standard_normal((1, KV_HEADS * group, n, dim), np.float32)
        self.store = ops.compile(ops.update_cache)
        self.run = ops.compile(lambda q, held, at: ops.attention(q, held, at, 0.2, window))

    def held(self) -> LayerCache:
        places = np.arange(self.k.shape[2], dtype=np.int32)[None]
        return self.store(self.ops.new_cache(*self.k.shape), self.k, self.v, places)

    def chunk(self, held: LayerCache, start: int, end: int, freed: int = 0) -> np.ndarray:
        """Compute the attention of some tokens in a cache whose first slots were freed."""
        at = np.arange(start - freed, end - freed, dtype=np.int32)[None]
        return np.asarray(self.run(self.q[:, :, start:end], held, at))

    def alone(self, held: LayerCache, start: int, end: int) -> np.ndarray:
        """Compute the attention of some tokens, of one at a time."""
        return np.concatenate([self.chunk(held, t, t + 1) for t in range(start, end)], axis=2)


@pytest.mark.complete
@pytest.mark.each_value("cache_type", "target")
@pytest.mark.parametrize("cache_type", ROW_TYPES)
def test_a_token_has_the_same_bits_alone_and_in_any_chunk(kernels: Kernels, cache_type: str):
    dims = [d for d in DIMS if d % (ROW_TYPES[cache_type].group or 1) == 0]

    @settings(max_examples=EXAMPLES)
    @given(
        dim=st.sampled_from(dims),
        group=st.integers(1, 4),
        window=st.none() | st.integers(1, 90),
        start=st.integers(0, 90),
        sizes=st.lists(st.integers(2, 50), min_size=1, max_size=3),
    )
    def check(dim: int, group: int, window: int | None, start: int, sizes: list[int]) -> None:
        bounds = list(accumulate(sizes, initial=start))
        text = Text(kernels, cache_type, dim, group, window, bounds[-1])
        held = text.held()
        chunks = [text.chunk(held, *ends) for ends in pairwise(bounds)]
        alone = text.alone(held, start, bounds[-1])
        assert np.concatenate(chunks, axis=2).tobytes() == alone.tobytes()

    check()


@pytest.mark.each_value("cache_type", "target")
@pytest.mark.parametrize("cache_type", ROW_TYPES)
def test_bits_stay_when_slots_are_freed(kernels: Kernels, cache_type: str):
    text = Text(kernels, cache_type, 64, 3, window := 20, 170)
    held = text.held()
    for start, end in ((90, 91), (90, 130), (150, 170)):
        freed = (start - (window - 1)) // BLOCK * BLOCK
        shifted = text.ops.shift_cache(held, np.array([freed], np.int32))
        moved = text.chunk(shifted, start, end, freed)
        assert freed > 0
        assert moved.tobytes() == text.alone(held, start, end).tobytes()


@pytest.mark.parametrize("broken", [np.inf, np.nan])
def test_only_tokens_that_see_a_broken_position_are_broken(kernels: Kernels, broken: float):
    text = Text(kernels, "f32", 24, 2, window := 12, 80)
    at = 45
    text.k[0, 0, at, 3], text.v[0, 1, at, 5] = broken, broken
    held = text.held()
    found, alone = text.chunk(held, 30, 80), text.alone(held, 30, 80)
    assert np.array_equal(found, alone, equal_nan=True)
    is_finite = np.isfinite(found).all(axis=(0, 1, 3))
    assert is_finite.tolist() == [not at <= t < at + window for t in range(30, 80)]
