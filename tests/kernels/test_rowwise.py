"""Tests of normalization and SwiGLU, with rows and numbers of any size."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from phicore_jax.kernels.runtime import Kernels

from phicore.testing import oracle, tolerances
from phicore.testing.compare import assert_close

SIZES = (1, 15, 16, 17, 100)
ROWS = (1, 3, 33)


def test_rows_of_any_size_equal_float64(kernels: Kernels, rng: np.random.Generator):
    xs = [rng.standard_normal((m, n), np.float32) for n in SIZES for m in ROWS]
    gates = [3 * rng.standard_normal((m, 2 * n), np.float32) for n in SIZES for m in ROWS]
    weights = [rng.standard_normal(x.shape[1], np.float32) for x in xs]

    @jax.jit
    def run(xs, weights, gates):
        norms = [kernels.rms_norm(x, w, 1e-5) for x, w in zip(xs, weights, strict=True)]
        centred = [kernels.layer_norm(x, w, w, 1e-5) for x, w in zip(xs, weights, strict=True)]
        return norms, centred, [kernels.swiglu(g) for g in gates]

    norms, centred, products = run(xs, weights, gates)
    for x, w, y in zip(xs, weights, norms, strict=True):
        assert_close(y, oracle.rms_norm(x, w, 1e-5), tolerances.ELEMENTWISE)
    for x, w, y in zip(xs, weights, centred, strict=True):
        assert_close(y, oracle.layer_norm(x, w, w, 1e-5), tolerances.ELEMENTWISE)
    for g, y in zip(gates, products, strict=True):
        assert_close(y, oracle.swiglu(g), tolerances.ELEMENTWISE)


def test_a_row_has_the_same_bits_alone_and_with_others(kernels: Kernels, rng: np.random.Generator):
    x = rng.standard_normal((5, 70), np.float32)
    weight, bias = rng.standard_normal((2, 70), np.float32)

    @jax.jit
    def run(x, weight, bias):
        norms = kernels.rms_norm(x, weight, 1e-5), kernels.layer_norm(x, weight, bias, 1e-5)
        return *norms, kernels.swiglu(x)

    alone = [run(x[i : i + 1], weight, bias) for i in range(len(x))]
    for y, rows in zip(run(x, weight, bias), zip(*alone, strict=True), strict=True):
        assert np.array_equal(y, np.concatenate(rows))


def test_rms_norm_of_zeros_tiny_and_huge_rows(kernels: Kernels, rng: np.random.Generator):
    """Each row is normalized by itself: a row of NaN does not affect the others."""
    x = rng.standard_normal((1, 40), np.float32) * np.array([[0], [1e-10], [1], [1e15]], np.float32)
    x = np.concatenate([x, np.full((1, 40), np.nan, np.float32)])
    weight = rng.standard_normal(40, np.float32)
    y = np.asarray(jax.jit(lambda x, w: kernels.rms_norm(x, w, 1e-5))(x, weight))
    assert not y[0].any()
    for row, expected in zip(y[1:4], oracle.rms_norm(x[1:4], weight, 1e-5), strict=True):
        assert_close(row, expected, tolerances.ELEMENTWISE)
    assert np.isnan(y[4]).all()


@pytest.mark.parametrize("lanes", [16, 1], ids=["vector", "single"])
def test_swiglu_of_any_gate_equals_float64(kernels: Kernels, lanes: int):
    """Gates range from where silu is 0 to where silu(x) is x; each result is exact to float32."""
    sizes = np.concatenate([[0], np.geomspace(1e-6, 1e30, 127)])
    gates = np.concatenate([sizes, -sizes]).astype(np.float32).reshape(-1, lanes)
    both = np.concatenate([gates, np.full_like(gates, 0.75)], axis=1)
    y = np.asarray(jax.jit(kernels.swiglu)(both)).astype(np.float64)
    exact = gates.astype(np.float64)
    with np.errstate(over="ignore"):
        exact = 0.75 * exact / (1 + np.exp(-exact))
    np.testing.assert_allclose(y, exact, rtol=1e-6, atol=1e-36)


def test_swiglu_nan_stays_where_it_is(kernels: Kernels):
    both = np.ones((2, 2 * 20), np.float32)
    both[0, 3], both[1, 20 + 17] = np.nan, np.nan
    found = np.isnan(np.asarray(jax.jit(kernels.swiglu)(both)))
    assert np.argwhere(found).tolist() == [[0, 3], [1, 17]]
