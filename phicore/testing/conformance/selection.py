"""Tests of `Backend.largest`, the selection behind top-k and top-p, compared with sorting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.backend import Backend
from phicore.testing.conformance.base import Conformance, examples

V = 13
MOST = 2**31 - 1
FARTHEST = -float(np.finfo(np.float32).max)


def expected(x: Any, counts: Any, total: int) -> np.ndarray:
    """Compute a row of `largest`: add counts from the largest number down to reach the total."""
    x, counts = np.array(x, np.float32), np.array(counts, np.int64)
    held = 0
    for number in np.unique(x)[::-1]:  # -0.0 and 0.0 are one number
        held += counts[x == number].sum()
        if held >= total:
            return x >= number
    return np.ones(len(x), bool)


# Few different numbers, so that many are tied; neighbours in float32; numbers of all magnitudes.
# The operation need not distinguish other numbers.
numbers = st.one_of(
    st.integers(-8, 0).map(lambda i: i / 4),
    st.integers(0, 5).map(lambda i: -1 - i * 2.0**-23),
    st.floats(FARTHEST, -(2.0**-125), width=32),
    st.sampled_from([-np.inf, -0.0, FARTHEST, -(2.0**127), -(2.0**-125)]),
)
counts = st.one_of(st.integers(0, 3), st.integers(0, MOST // V))


def by_order(x: np.ndarray, counts: np.ndarray, total: int) -> np.ndarray:
    """Compute what `expected` computes, quickly."""
    order = np.argsort(-x, kind="stable")
    held = np.cumsum(counts[order], dtype=np.int64)
    return x >= x[order[np.searchsorted(held, total)]]


class SelectionConformance(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def largest(cls, ops: Backend) -> Callable[..., np.ndarray]:
        """Return the compiled `Backend.largest`, for host arrays."""
        run = ops.compile(ops.largest)

        def call(x: Any, counts: Any, total: Any) -> np.ndarray:
            host = np.array(x, np.float32), np.array(counts, np.int32), np.array(total, np.int32)
            result = ops.to_numpy(run(*map(ops.asarray, host)))
            assert result.dtype == np.bool_
            return result

        return call

    @examples(400)
    @given(
        x=st.lists(numbers, min_size=V, max_size=V),
        counts=st.lists(counts, min_size=V, max_size=V),
        data=st.data(),
    )
    def test_largest_equals_sorting(
        self,
        largest: Callable[..., np.ndarray],
        x: list[float],
        counts: list[int],
        data: st.DataObject,
    ) -> None:
        some = np.cumsum(np.array(counts)[np.argsort(-np.array(x), kind="stable")])
        near = st.tuples(st.sampled_from(some.tolist()), st.integers(-1, 1)).map(sum)
        total = data.draw(st.one_of(near, st.integers(1, MOST)))
        total = min(max(total, 1), MOST)
        [found] = largest([x], [counts], [total])
        assert np.array_equal(found, expected(x, counts, total))

    @examples(100)
    @given(x=st.lists(numbers, min_size=V, max_size=V), k=st.integers(1, V + 3))
    def test_largest_of_ones_are_k_and_ties(
        self, largest: Callable[..., np.ndarray], x: list[float], k: int
    ) -> None:
        bound = sorted(np.array(x, np.float32))[::-1][min(k, V) - 1]
        [found] = largest([x], [[1] * V], [k])
        assert np.array_equal(found, np.array(x, np.float32) >= bound)

    def test_largest_rows_have_their_own_totals(self, largest: Callable[..., np.ndarray]) -> None:
        found = largest([[-1, 0, -2]] * 4, [[2, 3, 4]] * 4, [3, 4, 6, MOST])
        assert found.astype(int).tolist() == [[0, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1]]

    def test_largest_counts_of_zero_do_not_help(self, largest: Callable[..., np.ndarray]) -> None:
        assert largest([[0, -1, -2, -3]], [[0, 0, 1, 1]], [1]).tolist() == [
            [True, True, True, False]
        ]
        assert largest([[0, -1, -2, -3]], [[0, 0, 0, 0]], [1]).tolist() == [[True] * 4]

    def test_largest_of_one_number_is_it(self, largest: Callable[..., np.ndarray]) -> None:
        assert largest([[-3]] * 3, [[1]] * 3, [1, 2, MOST]).tolist() == [[True]] * 3

    @pytest.mark.parametrize("spread", [1e-7, 1.0, 20.0])
    def test_largest_large_vocabulary_equals_sorting(
        self, largest: Callable[..., np.ndarray], rng: np.random.Generator, spread: float
    ) -> None:
        size = 200_064  # Phi-4-mini
        x = -np.abs(rng.normal(size=(3, size)) * spread).astype(np.float32)
        counts = rng.integers(0, 2**13, (3, size), np.int32)
        total = [1, counts[1].sum() // 2, counts[2].sum()]
        for row, *arguments in zip(largest(x, counts, total), x, counts, total, strict=True):
            assert np.array_equal(row, by_order(*arguments))
