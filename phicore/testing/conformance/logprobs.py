"""Tests of log probabilities and of the order of the likeliest tokens, compared with float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.backend import Backend
from phicore.network import logprobs
from phicore.network.logprobs import MOST
from phicore.testing import tolerances
from phicore.testing.conformance.base import Conformance, examples

Found = dict[str, np.ndarray]
V = 43  # a group and a part of one beyond three levels of groups

grid = st.lists(
    st.one_of(st.integers(-12, 12).map(lambda i: i / 4), st.just(-np.inf)), min_size=V, max_size=V
)
"""Few different numbers, so that many are tied."""


def log_softmax(logits: Any) -> np.ndarray:
    x = np.array(logits, np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class LogprobsConformance(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def find(cls, ops: Backend) -> Callable[..., Found]:
        """Return the compiled `logprobs.logprobs`, for host arrays."""
        run = ops.compile(lambda *args: logprobs.logprobs(ops, *args))

        def call(logits: Any, tokens: Any) -> Found:
            host = np.array(logits, np.float32), np.array(tokens, np.int32)
            found = run(*map(ops.asarray, host))
            return {name: ops.to_numpy(array) for name, array in found.items()}

        return call

    @pytest.mark.parametrize("size", [1, 3, 20, 21, 160, 161, 1000, 49_152])
    @pytest.mark.parametrize("spread", [1e-3, 3.0, 30.0])
    def test_logprobs_equal_float64(
        self, find: Callable[..., Found], rng: np.random.Generator, size: int, spread: float
    ) -> None:
        logits = np.float32(100) + rng.normal(size=(5, size)).astype(np.float32) * np.float32(
            spread
        )
        tokens = rng.integers(0, size, 5)
        expected, found = log_softmax(logits), find(logits, tokens)
        assert {name: array.dtype for name, array in found.items()} == {
            "chosen": np.float32,
            "ids": np.int32,
            "likeliest": np.float32,
        }
        rows, count = np.arange(5), min(MOST, size)
        assert found["ids"].shape == found["likeliest"].shape == (5, count)
        near = partial(np.allclose, rtol=tolerances.ELEMENTWISE, atol=tolerances.PRODUCT)
        assert near(found["chosen"], expected[rows, tokens])
        at_ids = np.take_along_axis(expected, found["ids"].astype(np.int64), axis=1)
        assert near(found["likeliest"], at_ids)
        assert near(found["likeliest"], -np.sort(-expected)[:, :count])
        for row in range(5):
            order = list(zip(-found["likeliest"][row], found["ids"][row], strict=True))
            assert order == sorted(set(order)), "expected descending, ties by the lower id"

    @examples(100)
    @given(logits=grid, token=st.integers(0, V - 1))
    def test_logprobs_order_is_descending_ties_by_the_lower_id(
        self, find: Callable[..., Found], logits: list[float], token: int
    ) -> None:
        logits[token] = max(logits[token], -5.0)  # not all are -infinity
        found = find([logits], [token])
        expected = np.argsort(-np.array(logits), kind="stable")[:MOST]
        assert found["ids"][0].tolist() == expected.tolist()
        with np.errstate(divide="ignore"):
            figures = log_softmax([logits])[0][expected]
        assert np.allclose(found["likeliest"][0], figures, rtol=0, atol=tolerances.PRODUCT)

    def test_logprobs_of_a_row_do_not_depend_on_the_others(
        self, find: Callable[..., Found], rng: np.random.Generator
    ) -> None:
        """Check that rows are not mixed up; the last bits may depend on the number of rows."""
        logits, tokens = rng.normal(size=(4, 500)) * 5, [1, 7, 100, 499]
        together = find(logits, tokens)
        for row in range(4):
            alone = find(logits[row : row + 1], tokens[row : row + 1])
            assert alone["ids"][0].tolist() == together["ids"][row].tolist()
            for name in ("chosen", "likeliest"):
                assert np.allclose(alone[name][0], together[name][row], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_logprobs_of_scores_that_are_no_numbers_are_nan(
        self, find: Callable[..., Found], bad: float
    ) -> None:
        found = find([[0, bad, 1], [0, 2, 1], [-np.inf] * 3], [0, 0, 0])
        for name in ("chosen", "likeliest"):
            assert np.isnan(found[name][[0, 2]]).all()
            assert np.isfinite(found[name][1]).all()
        assert found["ids"][1].tolist() == [1, 2, 0]

    def test_logprobs_of_no_token_are_there_for_the_likeliest(
        self, find: Callable[..., Found]
    ) -> None:
        """Check a row whose sampled token is -1, the sign of an error."""
        assert find([[0, 5, 1]], [-1])["ids"].tolist() == [[1, 2, 0]]
