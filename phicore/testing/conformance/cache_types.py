"""Tests of the cache types: their rounding and their memory."""

from __future__ import annotations

import numpy as np
import pytest

from phicore.backend import Backend, BackendOptions, LayerCache, cache_types
from phicore.errors import BackendError
from phicore.testing import oracle
from phicore.testing.compare import assert_close, relative_error
from phicore.testing.conformance.base import EXACT, Conformance, Make

TYPES = {name: kind for name, kind in cache_types.TYPES.items() if hasattr(np, kind.dtype)}
"""The types whose arrays a test can read."""
OWN = "own"
"""Stands for the first cache type that only this backend has. Only its error is tested."""
OWN_ERROR = 1e-2
B, H, K, S, D = 2, 6, 3, 40, 64
STARTS = (3, 17)  # the first positions of the two sequences


def filled(ops: Backend, k: np.ndarray, v: np.ndarray) -> LayerCache:
    batch, heads, capacity, dim = k.shape
    positions = np.broadcast_to(np.arange(capacity, dtype=np.int32), (batch, capacity))
    update = ops.compile(ops.update_cache, donate=(0,))
    empty = ops.new_cache(batch, heads, capacity, dim)
    return update(empty, *map(ops.asarray, (k, v, positions)))


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def seen(ops: Backend, held: LayerCache, rng: np.random.Generator) -> np.ndarray:
    """Compute attention of the last position over a cache: (B, H, 1, D)."""
    q, last = normal(rng, B, H, 1, D), np.full((B, 1), S - 1, np.int32)
    run = ops.compile(lambda q, held, at: ops.attention(q, held, at, D**-0.5, None))
    return ops.to_numpy(run(ops.asarray(q), held, ops.asarray(last)))


class CacheTypesConformance(Conformance):
    @pytest.fixture(scope="class", params=[*TYPES, OWN])
    @classmethod
    def case(cls, make: Make, request: pytest.FixtureRequest) -> tuple[Backend, str]:
        """Return the backend with caches of a type, and the name of the type."""
        known, cache_type = make(EXACT).capabilities.cache_types, request.param
        if cache_type == OWN:
            own = [t for t in known if t not in TYPES]
            if not own:
                pytest.skip("the backend has no type of its own")
            cache_type = own[0]
        if cache_type not in known:
            pytest.skip(f"the backend has no caches of {cache_type}")
        return make(BackendOptions(cache_type=cache_type)), cache_type

    @pytest.mark.parametrize(("tokens", "window"), [(1, None), (1, 5), (9, None), (12, 7)])
    def test_attention_is_as_exact_as_the_type(
        self, case: tuple[Backend, str], tokens: int, window: int | None, rng: np.random.Generator
    ) -> None:
        ops, cache_type = case
        q, k, v = normal(rng, B, H, tokens, D), *normal(rng, 2, B, K, S, D)
        positions = (np.array(STARTS)[:, None] + np.arange(tokens)).astype(np.int32)
        run = ops.compile(lambda q, held, at: ops.attention(q, held, at, D**-0.5, window))
        y = ops.to_numpy(run(ops.asarray(q), filled(ops, k, v), ops.asarray(positions)))
        expected = oracle.attention(q, k, v, positions, D**-0.5, window)
        bound = TYPES[cache_type].error if cache_type in TYPES else OWN_ERROR
        assert_close(y, expected, bound)
        is_known = cache_type in TYPES and cache_type != "f32"
        # A much smaller error would mean that the cache has another type.
        assert not is_known or relative_error(y, expected) > bound / 30

    def test_cache_takes_the_memory_of_its_type(self, case: tuple[Backend, str]) -> None:
        ops, cache_type = case
        arrays = [ops.to_numpy(a) for a in ops.new_cache(B, K, S, D).values()]
        if cache_type in TYPES:
            row_bytes = TYPES[cache_type].bytes_of_row(D)
            assert sum(a.nbytes for a in arrays) == 2 * B * K * S * row_bytes
        assert all(a.shape[:3] == (B, K, S) for a in arrays)

    @pytest.mark.parametrize("tokens", [1, 4])
    def test_update_cache_is_the_same_whether_at_once_or_later(
        self, case: tuple[Backend, str], tokens: int, rng: np.random.Generator
    ) -> None:
        ops, _ = case
        k, v = normal(rng, 2, B, K, S, D)
        new_k, new_v = normal(rng, 2, B, K, tokens, D)
        positions = (np.array(STARTS)[:, None] + np.arange(tokens)).astype(np.int32)
        update = ops.compile(ops.update_cache, donate=(0,))
        later = update(filled(ops, k, v), *map(ops.asarray, (new_k, new_v, positions)))
        later = {name: np.array(ops.to_numpy(a)) for name, a in later.items()}
        for b, row in enumerate(positions):
            k[b, :, row], v[b, :, row] = new_k[b].swapaxes(0, 1), new_v[b].swapaxes(0, 1)
        for name, a in filled(ops, k, v).items():
            assert np.array_equal(later[name], ops.to_numpy(a)), name

    def test_grown_and_shifted_cache_holds_the_same(
        self, case: tuple[Backend, str], rng: np.random.Generator
    ) -> None:
        ops, _ = case
        k, v = normal(rng, 2, B, K, S, D)
        held = {name: np.array(ops.to_numpy(a)) for name, a in filled(ops, k, v).items()}
        rows, slots = (ops.asarray(np.array(x, np.int32)) for x in (range(B), [S] * B))
        copied = ops.copy_rows(filled(ops, k, v), rows, slots, S + 7)
        grown = {name: ops.to_numpy(a) for name, a in copied.items()}
        shift = ops.compile(ops.shift_cache, donate=(0,))
        shifted = shift(filled(ops, k, v), ops.asarray(np.array([4, 0], np.int32)))
        for name, a in held.items():
            assert np.array_equal(grown[name][:, :, :S], a)
            moved = ops.to_numpy(shifted[name])
            assert np.array_equal(moved[0, :, : S - 4], a[0, :, 4:])
            assert np.array_equal(moved[1], a[1])

    @pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
    def test_number_that_is_not_finite_is_seen(
        self, case: tuple[Backend, str], bad: float, rng: np.random.Generator
    ) -> None:
        ops, cache_type = case
        if bad == np.inf and cache_type in TYPES and TYPES[cache_type].scale_dtype is None:
            pytest.skip("the type has infinity, which attention may give a weight of 0")
        k, v = normal(rng, 2, B, K, S, D)
        v[0, 1, 30, 7] = bad
        with np.errstate(invalid="ignore"):
            y = seen(ops, filled(ops, k, v), rng)
        is_spoilt = ~np.isfinite(y).all(axis=-1)[:, :, 0]
        assert is_spoilt.tolist() == [[False, False, True, True, False, False], [False] * 6]

    @pytest.mark.parametrize("size", [1e-6, 1e-5, 3e-4, 1e-2, 1.0, 1e4])
    def test_numbers_of_any_size_come_back(
        self, case: tuple[Backend, str], size: float, rng: np.random.Generator
    ) -> None:
        """Read values back with a token that sees a single position, and so gets its value."""
        ops, cache_type = case
        k, v = normal(rng, B, K, S, D), size * normal(rng, B, K, S, D)
        q, first = normal(rng, B, H, 1, D), np.zeros((B, 1), np.int32)
        run = ops.compile(lambda q, held, at: ops.attention(q, held, at, D**-0.5, None))
        y = ops.to_numpy(run(ops.asarray(q), filled(ops, k, v), ops.asarray(first)))
        expected = np.repeat(v[:, :, :1], H // K, axis=1)
        largest = np.abs(expected).max()
        share, least = OWN_ERROR, 2.0**-20
        if cache_type in TYPES:
            share, least = TYPES[cache_type].rounding, TYPES[cache_type].least
        bound = max((1.01 * share + 1e-6) * largest, 1.01 * least)
        found = np.abs(y - expected).max()
        assert found <= bound, (
            f"values up to {largest:.2g}: off by {found:.2g}, {bound:.2g} allowed"
        )

    def test_rows_of_zeros_and_tiny_numbers_are_finite(
        self, case: tuple[Backend, str], rng: np.random.Generator
    ) -> None:
        ops, _ = case
        k, v = np.zeros((2, B, K, S, D), np.float32)
        k[0, 0, 3] = v[0, 0, 3] = 1e-30
        k[1, 2, 9], v[1, 2, 9] = 1e-6, 1e4
        assert np.isfinite(seen(ops, filled(ops, k, v), rng)).all()

    def test_q8_0_refuses_heads_that_are_no_blocks(self, make: Make) -> None:
        if "q8_0" not in make(EXACT).capabilities.cache_types:
            pytest.skip("the backend has no caches of q8_0")
        ops = make(BackendOptions(cache_type="q8_0"))
        with pytest.raises(BackendError, match=r"^cache type q8_0: .* heads have 80 channels"):
            ops.new_cache(1, 1, 8, 80)
