"""Tests of the GPU kernels of products, run on the CPU, against `gguf` and float64."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from phicore.gguf.random_models import random_matrix
from phicore.gguf.reader import GGUFTensor
from phicore.testing import oracle
from phicore.testing.compare import assert_close, relative_error

pytest.importorskip("jax", reason="install phicore-jax")
pytest.importorskip("llvmlite", reason="install llvmlite, for the kernels of JAX")

import jax.numpy as jnp
from cuda import host
from cuda.host import product, quantize
from phicore_jax.cuda import find_kernels, runtime
from phicore_jax.cuda.formats import FORMATS
from phicore_jax.cuda.linear import (
    emit_product,
    emit_quantize_gated,
    emit_quantize_normed,
    integers,
)
from phicore_jax.cuda.ptx import ptx

kernels, about = find_kernels()
assert kernels is not None, about

BOUND = 1e-4  # matrices are tiny; with many numbers it is 3e-5 (`Capabilities.linear_error`)


@pytest.fixture(params=FORMATS, ids=lambda t: t.name)
def ggml_type(request: pytest.FixtureRequest) -> Type:
    return request.param


def blocks(ggml_type: Type, rows: int, columns: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(1))
    return random_matrix(ggml_type, rows, columns, generator, 0.05)


@pytest.mark.complete
@pytest.mark.each_value("ggml_type", "m")
@pytest.mark.parametrize(
    ("rows", "columns", "m"),
    [(1, 256, 1), (7, 256, 1), (4, 1024, 1), (5, 1280, 1), (3, 768, 2), (2, 512, 8)],
    ids=str,
)
def test_product_is_that_of_float64(ggml_type: Type, rows: int, columns: int, m: int):
    data = blocks(ggml_type, rows, columns)
    x = np.random.default_rng(2).standard_normal((m, columns)).astype(np.float32)
    weight = gguf.quants.dequantize(data, ggml_type).astype(np.float64)
    y = product(ggml_type, data, x)
    assert_close(y, x.astype(np.float64) @ weight.T, BOUND)


def test_dense_is_what_gguf_says(ggml_type: Type):
    data = blocks(ggml_type, 6, 1280)
    w = kernels.pack([GGUFTensor("w", ggml_type, (6, 1280), data)])
    expected = gguf.quants.dequantize(data, ggml_type)
    assert np.array_equal(w.dense(), expected)
    index = jnp.asarray(np.array([5, 0, 0], np.int32))
    assert np.array_equal(kernels.rows(index, w), expected[[5, 0, 0]])


@pytest.mark.complete
@pytest.mark.each_value("ggml_type", "is_fast")
@pytest.mark.parametrize(("is_fast", "bound"), [(False, 1.2e-5), (True, 4e-4)])
def test_products_of_many_rows_are_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, ggml_type: Type, is_fast: bool, bound: float
):
    """The matrix is expanded in three parts, of which the last is smaller."""
    monkeypatch.setattr(runtime, "launch", host.launch)
    monkeypatch.setattr(runtime, "EXPANDED_BYTES", 1)
    data = blocks(ggml_type, 600, 768)
    w = kernels.pack([GGUFTensor("w", ggml_type, (600, 768), data)])
    x = 30 * np.random.default_rng(2).standard_normal((11, 768)).astype(np.float32)
    x[3], x[4] = 0, 1e-3 * x[4]
    expected = x.astype(np.float64) @ gguf.quants.dequantize(data, ggml_type).astype(float).T
    x_many = kernels.prepared(jnp.asarray(x), None)
    y = np.asarray(kernels.linear(x_many, w, is_fast=is_fast))
    assert_close(y, expected, bound)
    assert_close(y[4], expected[4], bound)
    assert not y[3].any()


@pytest.mark.each_value("ggml_type", "rows")
@pytest.mark.parametrize("rows", [3, 20])
def test_rows_are_multiplied_by_the_matrices_of_their_experts(
    monkeypatch: pytest.MonkeyPatch, ggml_type: Type, rows: int
):
    """Each expert has 7 rows, an odd number. The second expert gets no row of activations."""
    monkeypatch.setattr(runtime, "launch", host.launch)
    data = blocks(ggml_type, 4 * 7, 512)
    tensors = [GGUFTensor("w", ggml_type, (7, 512), part) for part in np.split(data, 4)]
    rng = np.random.default_rng(7)
    x = rng.standard_normal((rows, 512)).astype(np.float32)
    experts = rng.choice(np.array([0, 2, 3], np.int32), rows)
    w = kernels.pack(tensors, 4)
    assert (w.rows, w.columns) == (7, 512)
    prepared = kernels.prepared(jnp.asarray(x), None)
    y = np.asarray(kernels.linear(prepared, w, jnp.asarray(experts)))
    values = gguf.quants.dequantize(data, ggml_type).astype(np.float64).reshape(4, 7, 512)
    assert_close(y, np.einsum("mk,mnk->mn", x.astype(float), values[experts]), BOUND)


def test_planes_take_hardly_more_than_the_file(ggml_type: Type):
    data = blocks(ggml_type, 4, 2048)
    planes = FORMATS[ggml_type].planes(jnp.asarray(data))
    assert sum(plane.nbytes for plane in planes) <= 1.04 * data.nbytes
    assert all(len(plane) == 4 for plane in planes)


def test_parts_of_a_matrix_lie_on_top_of_each_other(ggml_type: Type):
    parts = [blocks(ggml_type, rows, 512) for rows in (3, 2)]
    tensors = [GGUFTensor("w", ggml_type, (len(part), 512), part) for part in parts]
    w = kernels.pack(tensors)
    assert (w.rows, w.columns) == (5, 512)
    assert np.array_equal(w.dense(), gguf.quants.dequantize(np.concatenate(parts), ggml_type))


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e20])
def test_activations_of_any_size_are_rounded_alike(size: float):
    x = (size * np.random.default_rng(3).standard_normal((2, 96))).astype(np.float32)
    parts, unit, sums = quantize(x)
    halves = whole(parts)
    assert np.array_equal(halves.sum(2), sums)
    groups = x.reshape(6, 32)
    error = halves.reshape(6, 32) * unit[:, None].astype(float) - groups
    assert (np.abs(error).max(1) <= np.abs(groups).max(1) / 32512 * 0.51).all()


def whole(parts: np.ndarray) -> np.ndarray:
    """Put the bytes of quantized activations (4, G, 16) together, (G, 2, 16)."""
    upper, lower = parts.astype(int).reshape(2, 2, -1, 16)
    return (256 * upper + lower).swapaxes(0, 1)


def numbers(found: list[np.ndarray]) -> np.ndarray:
    """Convert quantized activations back to numbers, float64, flattened."""
    parts, unit, _ = found
    return (whole(parts) * unit[:, None, None].astype(float)).ravel()


@pytest.mark.parametrize("columns", [96, 256, 640])
def test_integers_of_a_norm_are_those_of_what_it_gives(columns: int):
    x, weight = (np.random.default_rng(5).standard_normal((4, columns)) for _ in range(2))
    x, weight = (3 * x).astype(np.float32), weight[0].astype(np.float32)
    x[1] *= 1e-4  # so small that eps matters
    groups = x.size // 32
    constants = (groups, columns, 1e-5)
    found = host.run(emit_quantize_normed, constants, [x, weight], integers(groups), groups)
    expected = oracle.rms_norm(x, weight, 1e-5)
    assert_close(numbers(found), expected.ravel(), BOUND)
    assert np.array_equal(found[2], whole(found[0]).sum(2))


def test_integers_of_gates_are_those_of_what_they_give():
    gate_up = np.random.default_rng(6).standard_normal((3, 2 * 160)).astype(np.float32)
    gate_up[0, :4] = 100, -100, 1e4, -1e4  # nothing overflows
    groups = 3 * 160 // 32
    found = host.run(emit_quantize_gated, (groups, 160), [gate_up], integers(groups), groups)
    assert_close(numbers(found), oracle.swiglu(gate_up).ravel(), BOUND)


def test_rows_of_a_norm_that_are_not_finite_stay_apart():
    x = np.ones((2, 64), np.float32)
    x[1, 3] = np.inf
    found = host.run(
        emit_quantize_normed, (4, 64, 1e-5), [x, np.ones(64, np.float32)], integers(4), 4
    )
    assert np.isfinite(found[1][:2]).all()
    assert np.isnan(found[1][2])


def test_activations_of_zeros_are_zeros_and_others_not_finite_are_not():
    x = np.zeros((3, 64), np.float32)
    x[1, 40], x[2, 3] = np.nan, np.inf
    y = product(Type.Q8_0, blocks(Type.Q8_0, 2, 64), x)
    assert y[0].tolist() == [0, 0]
    assert np.isnan(y[1:]).all()


@pytest.mark.complete
def test_rows_of_activations_do_not_disturb_each_other(ggml_type: Type):
    data = blocks(ggml_type, 3, 256)
    x = np.random.default_rng(4).standard_normal((5, 256)).astype(np.float32)
    together = product(ggml_type, data, x)
    assert relative_error(product(ggml_type, data, x[3:4])[0], together[3]) < 1e-6


def test_ptx_is_written_for_every_type(ggml_type: Type):
    fmt = FORMATS[ggml_type]
    text = ptx(emit_product, (fmt, (32, 1280), 1), 3 + fmt.plane_count + 1)
    assert ".target sm_75" in text
    assert ".entry product" in text
    assert "dp4a" in text
    assert "ld.global.nc.v4" in text  # 16 bytes at once
    assert "shfl.sync.bfly" in text
    assert "ld.local" not in text  # all in registers
