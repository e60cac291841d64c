"""Tests of `linear` and `embedding` with every ggml type, compared with float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from phicore.backend import Array, Backend, Weight
from phicore.gguf.quants import AFFINE_TYPES
from phicore.testing import oracle, tolerances
from phicore.testing.compare import assert_close
from phicore.testing.conformance.base import Conformance

DENSE_TYPES = (Type.F32, Type.F16, Type.BF16, Type.IQ4_XS, Type.IQ2_XXS, Type.TQ2_0, Type.MXFP4)
N, K = 44, 512
ROWS = (1, 2, 5)

PARTS = {
    "same": [Type.Q4_K, Type.Q4_K],
    "Q4_K_M-qkv": [Type.Q4_K, Type.Q4_K, Type.Q6_K],
    "not-neighbours": [Type.Q4_K, Type.Q8_0, Type.Q4_K],
    "same-layout": [Type.Q4_1, Type.Q4_K, Type.Q5_0, Type.Q8_0],
    "with-dense": [Type.F16, Type.Q3_K, Type.F32, Type.IQ4_NL],
}


class ProductsConformance(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def products(cls, ops: Backend) -> Callable[..., Any]:
        """Return a compiled function that computes several products and looks up rows."""

        def run(
            weight: Weight, xs: list[Array], ids: Array | None
        ) -> tuple[list[Array], Array | None]:
            rows = None if ids is None else ops.embedding(ids, weight)
            return [ops.linear(x, weight) for x in xs], rows

        return ops.compile(run)

    @pytest.mark.parametrize("data_type", [*AFFINE_TYPES, *DENSE_TYPES], ids=lambda t: t.name)
    def test_linear_and_embedding_one_part_equal_float64(
        self, ops: Backend, products: Callable[..., Any], data_type: Type, rng: np.random.Generator
    ) -> None:
        matrix = oracle.matrix([data_type], [N], K, rng)
        values = oracle.values(matrix)
        xs = [rng.standard_normal((m, K), np.float32) for m in ROWS]
        ids = np.array([[0, N - 1, 7], [7, 3, 0]], np.int32)  # (B, T)

        weight = ops.load_weight(matrix)
        ys, rows = products(weight, [ops.asarray(x) for x in xs], ops.asarray(ids))

        for x, y in zip(xs, ys, strict=True):
            assert_close(
                ops.to_numpy(y), x.astype(np.float64) @ values.T, ops.capabilities.linear_error
            )
        assert_close(ops.to_numpy(rows), values[ids], tolerances.DEQUANTIZED)

    @pytest.mark.parametrize("name", PARTS)
    def test_linear_and_embedding_several_parts_lie_on_top_of_each_other(
        self, ops: Backend, products: Callable[..., Any], name: str, rng: np.random.Generator
    ) -> None:
        types = PARTS[name]
        rows_of = [8, 20, 4, 12][: len(types)]
        matrix = oracle.matrix(types, rows_of, K, rng)
        values = oracle.values(matrix)
        xs = [rng.standard_normal((m, K), np.float32) for m in (1, 5)]
        ids = np.arange(sum(rows_of), dtype=np.int32)[None, ::-1].copy()
        ys, rows = products(ops.load_weight(matrix), [ops.asarray(x) for x in xs], ops.asarray(ids))
        for x, y in zip(xs, ys, strict=True):
            assert_close(
                ops.to_numpy(y), x.astype(np.float64) @ values.T, ops.capabilities.linear_error
            )
        assert_close(ops.to_numpy(rows), values[ids], tolerances.DEQUANTIZED)

    @pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
    @pytest.mark.parametrize("data_type", [Type.Q4_K, Type.Q8_0, Type.F16], ids=lambda t: t.name)
    def test_linear_of_what_is_not_finite_is_not_finite(
        self,
        ops: Backend,
        products: Callable[..., Any],
        data_type: Type,
        bad: float,
        rng: np.random.Generator,
    ) -> None:
        """Check that a NaN or an infinity is not lost in integers, and affects only its own row."""
        matrix = oracle.matrix([data_type], [N], K, rng)
        xs = [rng.standard_normal((m, K), np.float32) for m in (1, 5)]
        expected = xs[1][1:].astype(np.float64) @ oracle.values(matrix).T
        for x in xs:
            x[0, 100] = bad
        one, several = products(ops.load_weight(matrix), [ops.asarray(x) for x in xs], None)[0]
        for y in (one, several):
            assert not np.isfinite(ops.to_numpy(y)[0]).any()
        assert_close(ops.to_numpy(several)[1:], expected, ops.capabilities.linear_error)

    @pytest.mark.parametrize("data_type", [Type.Q4_K, Type.Q6_K, Type.F16], ids=lambda t: t.name)
    def test_linear_long_rows_equal_float64(
        self, ops: Backend, products: Callable[..., Any], data_type: Type, rng: np.random.Generator
    ) -> None:
        """Check rows of 8192 columns, which a kernel may have to divide into pieces."""
        matrix = oracle.matrix([data_type], [40], 8192, rng)
        x = rng.standard_normal((1, 8192), np.float32)
        [y], _ = products(ops.load_weight(matrix), [ops.asarray(x)], None)
        expected = x.astype(np.float64) @ oracle.values(matrix).T
        assert_close(ops.to_numpy(y), expected, ops.capabilities.linear_error)

    def test_linear_more_axes_keeps_them(
        self, ops: Backend, products: Callable[..., Any], rng: np.random.Generator
    ) -> None:
        matrix = oracle.matrix([Type.Q4_0], [6], 64, rng)
        shapes = [(64,), (2, 3, 64), (1, 1, 64)]
        xs = [rng.standard_normal(shape, np.float32) for shape in shapes]
        ys, _ = products(ops.load_weight(matrix), [ops.asarray(x) for x in xs], None)
        for x, y in zip(xs, ys, strict=True):
            result = ops.to_numpy(y)
            assert result.dtype == np.float32
            assert_close(
                result,
                x.astype(np.float64) @ oracle.values(matrix).T,
                ops.capabilities.linear_error,
            )

    @pytest.mark.parametrize("data_type", [Type.Q4_K, Type.Q8_0, Type.F16], ids=lambda t: t.name)
    @pytest.mark.parametrize("rows", [1, 5])
    def test_fused_norms_and_gates_equal_float64(
        self, ops: Backend, data_type: Type, rows: int, rng: np.random.Generator
    ) -> None:
        """Check that `rms_norm_linear` and `swiglu_linear` equal their two operations in turn."""
        matrix = oracle.matrix([data_type], [N], K, rng)
        x, gate_up = (rng.standard_normal((1, rows, n * K), np.float32) for n in (1, 2))
        norm = rng.standard_normal(K, np.float32)

        def run(x: Array, norm: Array, gate_up: Array, weight: Weight) -> tuple[Array, Array]:
            return ops.rms_norm_linear(x, norm, 1e-5, weight), ops.swiglu_linear(gate_up, weight)

        weight = ops.load_weight(matrix)
        found = ops.compile(run)(*map(ops.asarray, (x, norm, gate_up)), weight)
        values, bound = oracle.values(matrix), ops.capabilities.linear_error
        normed, gated = oracle.rms_norm(x, norm, 1e-5), oracle.swiglu(gate_up)
        assert_close(ops.to_numpy(found[0]), normed @ values.T, bound)
        assert_close(ops.to_numpy(found[1]), gated @ values.T, bound)
