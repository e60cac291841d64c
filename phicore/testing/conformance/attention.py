"""Tests of the cache and of attention, compared with plain loops in float64."""

import numpy as np
import pytest

from phicore.backend import Backend, LayerCache
from phicore.testing import oracle, tolerances
from phicore.testing.compare import assert_close
from phicore.testing.conformance.base import Conformance

H, K, D, S = 6, 3, 4, 11


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def made_of(ops: Backend, k: np.ndarray, v: np.ndarray) -> LayerCache:
    """Make a cache that holds the given entries, stored by `update_cache` as in the graph."""
    batch, heads, capacity, dim = k.shape
    cache = ops.new_cache(batch, heads, capacity, dim)
    positions = np.broadcast_to(np.arange(capacity, dtype=np.int32), (batch, capacity))
    update = ops.compile(ops.update_cache, donate=(0,))
    return update(cache, ops.asarray(k), ops.asarray(v), ops.asarray(positions))


def host(ops: Backend, cache: LayerCache) -> tuple[np.ndarray, np.ndarray]:
    """Copy a cache to the host. An update may later write into the cache itself."""
    return np.array(ops.to_numpy(cache["k"])), np.array(ops.to_numpy(cache["v"]))


def check_attention(
    ops: Backend,
    rng: np.random.Generator,
    positions: list[list[int]],
    window: int | None,
    heads: int = H,
    beyond: float | None = None,
    beyond_value: float = 1e30,
) -> None:
    """Compare attention with the oracle.

    If `beyond` is given, all keys after a row's last position have this value, and all values
    `beyond_value`. The oracle does not see them.
    """
    batch, tokens = np.shape(positions)
    k, v = normal(rng, batch, K, S, D), normal(rng, batch, K, S, D)
    q = 3 * normal(rng, batch, heads, tokens, D)
    expected = oracle.attention(q, k, v, np.array(positions), 0.7, window)
    if beyond is not None:
        for b, row in enumerate(positions):
            k[b, :, row[-1] + 1 :], v[b, :, row[-1] + 1 :] = beyond, beyond_value
    run = ops.compile(lambda q, held, at: ops.attention(q, held, at, 0.7, window))
    args = (ops.asarray(q), made_of(ops, k, v), ops.asarray(np.array(positions, np.int32)))
    with np.errstate(invalid="ignore"):  # keys may be infinite; only the result matters here
        result = ops.to_numpy(run(*args))
    assert_close(result, expected, tolerances.ATTENTION)


class AttentionConformance(Conformance):
    def test_new_cache_has_its_shape(self, ops: Backend) -> None:
        cache = ops.new_cache(2, K, S, D)
        assert all(tuple(array.shape[:3]) == (2, K, S) for array in cache.values())

    def test_new_cache_layers_share_nothing(self, ops: Backend, rng: np.random.Generator) -> None:
        first, second = ops.new_cache(1, K, S, D), ops.new_cache(1, K, S, D)
        before = host(ops, second)
        new = ops.asarray(normal(rng, 1, K, 1, D))
        ops.update_cache(first, new, new, ops.asarray(np.array([[2]], np.int32)))
        for old, now in zip(before, host(ops, second), strict=True):
            assert old.tobytes() == now.tobytes()  # the numbers may be anything, NaN too

    @pytest.mark.parametrize(
        "positions",
        [
            pytest.param([[0]], id="B1-T1-first"),
            pytest.param([[S - 1]], id="B1-T1-last"),
            pytest.param([[3, 4, 5, 6]], id="B1-T4"),
            pytest.param([[S - 4, S - 3, S - 2, S - 1]], id="B1-T4-end"),
            pytest.param([[4], [0], [S - 1]], id="B3-T1"),
            pytest.param([[0, 1, 2], [7, 8, 9], [S - 3, S - 2, S - 1]], id="B3-T3"),
        ],
    )
    def test_update_cache_writes_the_new_and_nothing_else(
        self, ops: Backend, rng: np.random.Generator, positions: list[list[int]]
    ) -> None:
        batch, tokens = np.shape(positions)
        k, v = normal(rng, batch, K, S, D), normal(rng, batch, K, S, D)
        new_k, new_v = normal(rng, batch, K, tokens, D), normal(rng, batch, K, tokens, D)
        cache = made_of(ops, k, v)
        run = ops.compile(ops.update_cache, donate=(0,))
        args = (ops.asarray(new_k), ops.asarray(new_v), ops.asarray(np.array(positions, np.int32)))
        result = host(ops, run(cache, *args))
        for b, row in enumerate(positions):
            for t, position in enumerate(row):
                k[b, :, position], v[b, :, position] = new_k[b, :, t], new_v[b, :, t]
        assert np.array_equal(result[0], k)
        assert np.array_equal(result[1], v)

    @pytest.mark.parametrize("capacity", [S, S + 6, S - 2], ids=["same", "more", "fewer"])
    @pytest.mark.parametrize("rows", [[0], [2, 0], [1, 1, 0, 2]], ids=str)
    def test_copy_rows_copies_rows_in_order(
        self, ops: Backend, rng: np.random.Generator, rows: list[int], capacity: int
    ) -> None:
        k, v = normal(rng, 3, K, S, D), normal(rng, 3, K, S, D)
        cache = made_of(ops, k, v)
        slots = [(S - 2, 3, 0)[row] for row in rows]
        indices, counts = (ops.asarray(np.array(x, np.int32)) for x in (rows, slots))
        found = ops.copy_rows(cache, indices, counts, capacity)
        assert type(found) is type(cache)
        for before, after, kept in zip((k, v), host(ops, found), host(ops, cache), strict=True):
            assert after.shape == (len(rows), K, capacity, D)
            for row, copied, count in zip(rows, after, slots, strict=True):
                assert np.array_equal(copied[:, :count], before[row, :, :count])
            assert np.array_equal(kept, before)

    def test_copy_rows_shares_no_memory_with_the_old_cache(
        self, ops: Backend, rng: np.random.Generator
    ) -> None:
        """Write into a copy, and into what was copied: neither changes the other."""
        k, v = normal(rng, 1, K, S, D), normal(rng, 1, K, S, D)
        row, count = (ops.asarray(np.array([n], np.int32)) for n in (0, S))
        update = ops.compile(ops.update_cache, donate=(0,))
        for is_copy_written in (True, False):
            cache = made_of(ops, k, v)
            copy = ops.copy_rows(cache, row, count, S)
            written, other = (copy, cache) if is_copy_written else (cache, copy)
            new = ops.asarray(normal(rng, 1, K, 1, D))
            update(written, new, new, ops.asarray(np.array([[3]], np.int32)))
            for before, after in zip((k, v), host(ops, other), strict=True):
                assert np.array_equal(after, before)

    @pytest.mark.parametrize("capacity", [S, S - 2], ids=["same", "fewer"])
    @pytest.mark.parametrize("index", [0, 2])
    def test_insert_row_replaces_one_row(
        self, ops: Backend, rng: np.random.Generator, index: int, capacity: int
    ) -> None:
        k, v = normal(rng, 3, K, S, D), normal(rng, 3, K, S, D)
        new = normal(rng, 1, K, capacity, D), normal(rng, 1, K, capacity, D)
        insert = ops.compile(ops.insert_row, donate=(0,))
        cache, row, count = made_of(ops, k, v), made_of(ops, *new), capacity - 1
        index_of, slots = (ops.asarray(np.array([x], np.int32)) for x in (index, count))
        found = insert(cache, row, index_of, slots)
        for before, one, after in zip((k, v), new, host(ops, found), strict=True):
            assert np.array_equal(after[index, :, :count], one[0, :, :count])
            others = [i for i in range(3) if i != index]
            assert np.array_equal(after[others], before[others])

    def test_slots_that_no_token_has_used_change_nothing(
        self, ops: Backend, rng: np.random.Generator
    ) -> None:
        """A new cache may hold anything, and so may slots after those that were copied."""
        k, v = normal(rng, 1, K, 3, D), normal(rng, 1, K, 3, D)
        q, slots = normal(rng, 1, K, 1, D), ops.asarray(np.array([[2]], np.int32))
        store = ops.compile(ops.update_cache, donate=(0,))
        attend = ops.compile(lambda q, cache: ops.attention(q, cache, slots, 0.5, None))
        found = []
        for capacity, moved in ((3, None), (S, None), (S, S + 40)):
            at = ops.asarray(np.array([[0, 1, 2]], np.int32))
            cache = store(ops.new_cache(1, K, capacity, D), ops.asarray(k), ops.asarray(v), at)
            if moved is not None:
                row, used = (ops.asarray(np.array([n], np.int32)) for n in (0, 3))
                cache = ops.copy_rows(cache, row, used, moved)
            found.append(ops.to_numpy(attend(ops.asarray(q), cache)))
        for other in found[1:]:
            assert_close(other, found[0], tolerances.SAME_GRAPH)

    @pytest.mark.parametrize("count", [[0], [1], [S - 1], [4, 9], [0, 10]], ids=str)
    def test_shift_cache_forgets_the_first_positions(
        self, ops: Backend, rng: np.random.Generator, count: list[int]
    ) -> None:
        k, v = normal(rng, len(count), K, S, D), normal(rng, len(count), K, S, D)
        shift = ops.compile(ops.shift_cache, donate=(0,))
        found = host(ops, shift(made_of(ops, k, v), ops.asarray(np.array(count, np.int32))))
        for before, after in zip((k, v), found, strict=True):
            assert after.shape == before.shape
            assert np.isfinite(after).all()
            for row, n in enumerate(count):
                assert np.array_equal(after[row, :, : S - n], before[row, :, n:])

    @pytest.mark.parametrize("window", [None, 1, 3, S])
    @pytest.mark.parametrize(
        "positions",
        [
            pytest.param([[0]], id="B1-T1-first"),
            pytest.param([[S - 1]], id="B1-T1-last"),
            pytest.param([[2, 3, 4, 5]], id="B1-T4"),
            pytest.param([[0, 1, 2], [6, 7, 8]], id="B2-T3"),
        ],
    )
    def test_attention_equals_float64(
        self, ops: Backend, rng: np.random.Generator, positions: list[list[int]], window: int | None
    ) -> None:
        check_attention(ops, rng, positions, window)

    @pytest.mark.parametrize("heads", [K, 4 * K], ids=["multi-head", "four-a-key"])
    def test_attention_other_group_sizes_equal_float64(
        self, ops: Backend, rng: np.random.Generator, heads: int
    ) -> None:
        check_attention(ops, rng, [[3, 4]], None, heads)

    @pytest.mark.parametrize("beyond", [1e30, -1e30])
    def test_attention_keys_beyond_the_live_prefix_do_not_matter(
        self, ops: Backend, rng: np.random.Generator, beyond: float
    ) -> None:
        check_attention(ops, rng, [[1, 2], [6, 7]], None, beyond=beyond)

    def test_attention_large_scores_stay_finite(
        self, ops: Backend, rng: np.random.Generator
    ) -> None:
        """Check that the softmax subtracts the maximum, since exp(1e4) overflows float32."""
        k, v, q = (normal(rng, 1, n, t, D) for n, t in ((K, S), (K, S), (H, 1)))
        positions = np.array([[S - 1]], np.int32)
        run = ops.compile(lambda q, held, at: ops.attention(q, held, at, 1e4, None))
        result = ops.to_numpy(run(ops.asarray(q), made_of(ops, k, v), ops.asarray(positions)))
        assert_close(result, oracle.attention(q, k, v, positions, 1e4, None), 1e-3)
