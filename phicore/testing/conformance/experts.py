"""Tests of layers with experts: the router and the products, compared with float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import assume, given
from hypothesis import strategies as st

from phicore.backend import Backend
from phicore.gguf.matrix import Matrix
from phicore.network.graph import ROUTER_JITTER_NOISE, sparse_mixer
from phicore.testing import oracle
from phicore.testing.compare import assert_close
from phicore.testing.conformance.base import Conformance, examples

X, N, K = 5, 44, 512
ROWS = (1, 2, 4, 5, 16, 17, 70, 330)
"""Numbers of rows: fewer and more than experts, several tiles of a kernel, over 32 per expert."""


def experts(types: list[Type], rows: list[int], rng: np.random.Generator) -> list[Matrix]:
    return [oracle.matrix(types, rows, K, rng) for _ in range(X)]


def products(
    ops: Backend, matrices: Sequence[Matrix], xs: Sequence[np.ndarray], ids: Sequence[np.ndarray]
) -> list[np.ndarray]:
    run = ops.compile(
        lambda weight, xs, ids: [
            ops.expert_linear(x, i, weight) for x, i in zip(xs, ids, strict=True)
        ]
    )
    device = [[ops.asarray(a) for a in arrays] for arrays in (xs, ids)]
    return [ops.to_numpy(y) for y in run(ops.load_experts(matrices), *device)]


def routed(scores: Sequence[float]) -> tuple[list[int], list[float]]:
    """Choose and weigh experts as transformers' `sparsemixer` does outside of training."""
    chosen: list[int] = []
    weights = []
    for _ in range(2):
        left = {i: s for i, s in enumerate(scores) if i not in chosen}
        best = max(left.values())
        first = min(i for i, s in left.items() if s == best)
        near = {}
        for i, s in left.items():
            factor = max(abs(s), best)
            distance = (best - s) / factor if factor else 0.0
            assume(abs(distance - 2 * ROUTER_JITTER_NOISE) > 1e-5)  # otherwise rounding decides
            if distance <= 2 * ROUTER_JITTER_NOISE:
                near[i] = np.exp(s - best)
        chosen.append(first)
        weights.append(near[first] / sum(near.values()))
    return chosen, weights


numbers = st.floats(-8, 8, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


class ExpertsConformance(Conformance):
    @pytest.mark.parametrize(
        "types",
        [[Type.Q4_K], [Type.Q6_K], [Type.Q3_K], [Type.Q8_0], [Type.F16], [Type.IQ4_XS]],
        ids=lambda types: types[0].name,
    )
    def test_expert_linear_equals_float64(
        self, ops: Backend, types: list[Type], rng: np.random.Generator
    ) -> None:
        matrices = experts(types, [N], rng)
        values = np.stack([oracle.values(matrix) for matrix in matrices])
        xs = [rng.standard_normal((m, K), np.float32) for m in ROWS]
        ids = [rng.integers(0, X, m, np.int32) for m in ROWS]
        for x, i, y in zip(xs, ids, products(ops, matrices, xs, ids), strict=True):
            expected = np.matmul(values[i], x.astype(np.float64)[:, :, None])[:, :, 0]
            assert y.dtype == np.float32
            assert_close(y, expected, ops.capabilities.linear_error)

    @pytest.mark.parametrize(
        "types",
        [[Type.Q4_K, Type.Q4_K], [Type.Q4_K, Type.Q6_K], [Type.F32, Type.Q5_0]],
        ids=lambda types: "-".join(t.name for t in types),
    )
    def test_expert_linear_gate_and_up_lie_on_top_of_each_other(
        self, ops: Backend, types: list[Type], rng: np.random.Generator
    ) -> None:
        for rows in ([32, 32], [20, 24]):
            matrices = experts(types, rows, rng)
            x = rng.standard_normal((9, K), np.float32)
            ids = np.array([4, 4, 0, 2, 4, 1, 0, 4, 3], np.int32)
            values = np.stack([oracle.values(matrix) for matrix in matrices])
            expected = np.matmul(values[ids], x.astype(np.float64)[:, :, None])[:, :, 0]
            cases = [x, x[:2]], [ids, ids[:2]]
            whole, first = products(ops, matrices, *cases)
            assert_close(whole, expected, ops.capabilities.linear_error)
            assert_close(first, expected[:2], ops.capabilities.linear_error)

    @pytest.mark.parametrize("chosen", [[2], [2, 0], [2] * 40, [0, 2] * 20], ids=len)
    def test_expert_linear_other_experts_have_no_influence(
        self, ops: Backend, chosen: list[int], rng: np.random.Generator
    ) -> None:
        """Check that experts that are not chosen have no influence, even if they hold NaN."""
        matrices = experts([Type.F32], [N], rng)
        for number in set(range(X)) - set(chosen):
            part = matrices[number].parts[0]
            spoilt = replace(part, data=np.full_like(part.data, 0xFF))  # NaN
            matrices[number] = Matrix("w", (spoilt,))
        values = np.stack([oracle.values(matrix) for matrix in matrices])
        x, ids = rng.standard_normal((len(chosen), K), np.float32), np.array(chosen, np.int32)
        [y] = products(ops, matrices, [x], [ids])
        expected = np.matmul(values[ids], x.astype(np.float64)[:, :, None])[:, :, 0]
        assert_close(y, expected, ops.capabilities.linear_error)

    @examples(60)
    @given(st.lists(numbers, min_size=4, max_size=4), st.sets(st.integers(0, 3)))
    def test_sparse_mixer_equals_the_reference(
        self, ops: Backend, scores: list[float], near: set[int]
    ) -> None:
        best = float(np.float32(max(scores)))
        for i in near:  # within 2 % of the best
            scores[i] = float(np.float32(best - 0.003 * (i + 1) * abs(best)))
        run = ops.compile(lambda scores: sparse_mixer(ops.xp, scores))
        found = run(ops.asarray(np.array([scores], np.float32)))
        chosen, weights = (ops.to_numpy(a)[0] for a in found)
        expected, expected_weights = routed([float(np.float32(s)) for s in scores])
        assert chosen.dtype == np.int32
        assert chosen.tolist() == expected
        assert_close(weights, np.array(expected_weights), 1e-6)

    def test_sparse_mixer_weighs_each_choice_by_itself(self, ops: Backend) -> None:
        scores = ops.asarray(
            np.array([[1, 3, 2, 0], [2, 2, 2, 2], [-1, -3, -1.01, -9]], np.float32)
        )
        chosen, weights = (ops.to_numpy(a) for a in sparse_mixer(ops.xp, scores))
        assert chosen.tolist() == [[1, 2], [0, 1], [0, 2]]
        assert_close(
            weights, np.array([[1, 1], [1 / 4, 1 / 3], [1 / (1 + np.exp(-0.01)), 1]]), 1e-6
        )
