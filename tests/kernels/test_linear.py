"""Tests of products: they are close to float64, and a row's bits depend on nothing but the row."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.made import (
    TYPES,
    block_columns,
    from_bytes,
    kernels_of,
    random_tensor,
    values,
)
from phicore_jax.kernels.build import supported_targets
from phicore_jax.kernels.formats import FORMATS
from phicore_jax.kernels.runtime import Kernels

from phicore.testing.compare import assert_close, relative_error

EXACT, DENSE = 3e-5, 2e-6
ROWS = (1, 2, 5, 8, 9, 16, 31, 33, 64, 70)
OUT = (1, 16, 17, 100)
BEST = supported_targets()[0]


def products(kernels: Kernels, xs: Sequence[np.ndarray], ws: list, **options: bool) -> list:
    """Multiply every x by every w, compiled as one function."""

    def run(xs, ws):
        return [[kernels.linear(x, w, **options) for w in ws] for x in xs]

    return [[np.asarray(y) for y in ys] for ys in jax.jit(run)(xs, ws)]


@pytest.mark.each_value("ggml_type", "target")
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_linear_equals_float64_and_rows_do_not_depend_on_their_number(
    target: str, kernels: Kernels, ggml_type: Type, rng: np.random.Generator
):
    rows = ROWS if target == BEST else ROWS[::3]  # other targets have fewer sizes of tiles
    block = block_columns(ggml_type)
    for columns in (block, 3 * block) if block > 32 else (block, 9 * block):
        tensors = [random_tensor(ggml_type, n, columns, rng) for n in OUT]
        x = rng.standard_normal((max(rows), columns), np.float32)
        ys = products(kernels, [x[:m] for m in rows], [kernels.pack([t]) for t in tensors])
        for t, *of_tensor in zip(tensors, *ys, strict=True):
            expected = x.astype(np.float64) @ values(t).astype(np.float64).T
            assert_close(of_tensor[-1], expected, EXACT if ggml_type in FORMATS else DENSE)
            for m, y in zip(rows, of_tensor, strict=True):
                assert np.array_equal(y, of_tensor[-1][:m]), (columns, t.shape, m)


@pytest.mark.complete
@pytest.mark.each_value("ggml_type", "target")
@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_linear_of_experts_gives_the_bits_of_each_expert_s_matrix(
    kernels: Kernels, ggml_type: Type, rng: np.random.Generator
):
    count, columns, rows = 3, max(512, block_columns(ggml_type)), (1, 2, 9, 40, 230)
    for out in (16, 41):
        tensors = [random_tensor(ggml_type, out, columns, rng) for _ in range(count)]
        x = rng.standard_normal((max(rows), columns), np.float32)
        ids = rng.integers(0, count, max(rows), np.int32)
        ids[:2] = 1
        skewed = np.where(ids == 0, 0, 2).astype(np.int32)
        weight = kernels.pack(tensors, count)
        for is_fast in {False, ggml_type in FORMATS and kernels.has_fast_products}:
            options = {"is_fast": is_fast}
            each = products(kernels, [x], [kernels.pack([t]) for t in tensors], **options)[0]
            counts = (max(rows),) if is_fast else rows  # few rows are always multiplied exactly
            run = jax.jit(
                lambda x, w, ids, counts=counts, options=options: [
                    kernels.linear(x[:m], w, ids[:m], **options) for m in counts
                ]
            )
            for chosen in (ids, skewed):
                expected = np.stack(each)[chosen, np.arange(max(rows))]
                for m, found in zip(counts, run(x, weight, chosen), strict=True):
                    assert np.array_equal(found, expected[:m]), (out, m)


@pytest.mark.parametrize("ggml_type", [Type.Q4_K, Type.Q6_K, Type.BF16], ids=lambda t: t.name)
def test_linear_does_not_depend_on_the_number_of_threads(ggml_type: Type, rng: np.random.Generator):
    tensor = random_tensor(ggml_type, 1000, 2048, rng)
    x = rng.standard_normal((70, 2048), np.float32)
    xs = [x[:1], x[:9], x]
    found = []
    for threads in (1, 2, 3):
        kernels = kernels_of(BEST, threads)
        weight = kernels.pack([tensor])
        run = jax.jit(lambda xs, w, kernels=kernels: [kernels.linear(x, w) for x in xs])
        found += [list(map(np.asarray, run(xs, weight))) for _ in range(10)]
        assert kernels.pool.size == threads
    for others in found[1:]:
        assert all(map(np.array_equal, others, found[0]))


# Types with one plane or two, with and without a minimum, with one or two scales in a group.
LAWFUL = (Type.Q4_1, Type.Q2_K, Type.Q5_0, Type.Q6_K, Type.F16)


@settings(max_examples=30)
@given(st.sampled_from(LAWFUL), st.integers(1, 75), st.integers(1, 70), st.randoms())
def test_linear_of_a_row_depends_on_nothing_but_the_row(
    ggml_type: Type, m: int, n: int, random: object
):
    """The result of a row depends neither on its place nor on its neighbours."""
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    columns = block_columns(ggml_type) * int(rng.integers(1, 4))
    kernels = kernels_of(BEST)
    tensor = random_tensor(ggml_type, n, columns, rng)
    x = rng.standard_normal((m, columns), np.float32) * 10.0 ** rng.integers(-6, 6, (m, 1))
    x = x.astype(np.float32)
    order = rng.permutation(m)
    weight = kernels.pack([tensor])
    [[y], [shuffled], [alone]] = products(kernels, [x, x[order], x[m // 2][None]], [weight])
    assert np.array_equal(shuffled, y[order])
    assert np.array_equal(alone[0], y[m // 2])


@pytest.mark.each_value("ggml_type", "target")
@pytest.mark.parametrize(
    "ggml_type", [Type.Q4_K, Type.Q8_0, Type.Q3_K, Type.F32], ids=lambda t: t.name
)
def test_linear_zero_tiny_and_huge_rows(
    kernels: Kernels, ggml_type: Type, rng: np.random.Generator
):
    """Kernels for quantized types treat activations below 1e-30 as zero."""
    tensor = random_tensor(ggml_type, 20, 512, rng)
    x = rng.standard_normal((40, 512), np.float32)
    sizes = np.array([0, 1e-35, 1e-25, 1e-10, 1e10, 1e30], np.float32)
    xs = [(x * size)[:m] for size in sizes for m in (1, 40)]
    expected = x.astype(np.float64) @ values(tensor).astype(np.float64).T
    ys = [y for [y] in products(kernels, xs, [kernels.pack([tensor])])]
    for size, y in zip(np.repeat(sizes, 2), ys, strict=True):
        if size < 1e-30:
            assert np.abs(y).max() <= size * 1e5
        else:
            assert_close(y / size, expected[: len(y)], EXACT)


@pytest.mark.each_value("ggml_type", "target")
@pytest.mark.parametrize(
    "ggml_type", [Type.Q4_K, Type.Q8_0, Type.Q3_K, Type.BF16], ids=lambda t: t.name
)
def test_linear_one_number_that_is_not_finite_spoils_its_row_and_no_other(
    kernels: Kernels, ggml_type: Type, rng: np.random.Generator
):
    tensor = random_tensor(ggml_type, 20, 512, rng)
    x = rng.standard_normal((40, 512), np.float32)
    cases = [(m, bad) for m in (1, 3, 40) for bad in (np.nan, np.inf, -np.inf)]
    xs = [x[:m].copy() for m, _ in cases]
    for spoiled, (m, bad) in zip(xs, cases, strict=True):
        spoiled[m // 2, 300] = bad
    [[whole], *found] = products(kernels, [x, *xs], [kernels.pack([tensor])])
    for [y], (m, _) in zip(found, cases, strict=True):
        others = np.arange(m) != m // 2
        assert not np.isfinite(y[m // 2]).any()
        assert np.array_equal(y[others], whole[:m][others])


@pytest.mark.each_value("ggml_type", "target")
@pytest.mark.parametrize("ggml_type", FORMATS, ids=lambda t: t.name)
def test_linear_fast_takes_8_bits_for_many_rows_alone(
    kernels: Kernels, ggml_type: Type, rng: np.random.Generator
):
    """The error is that of 8 bits; below 1e-4, the product would be the exact one."""
    tensor = random_tensor(ggml_type, 100, 768, rng)
    weight = kernels.pack([tensor])
    x = rng.standard_normal((70, 768), np.float32)
    xs = [x[:1], x[:32], x[:33], x]
    kind = kernels._compiler.target
    has_fast = kind.has_byte_dot or (kind.has_byte_pairs and ggml_type != Type.Q8_0)
    fast = products(kernels, xs, [weight], is_fast=True)
    exact = products(kernels, xs, [weight])
    expected = x.astype(np.float64) @ values(tensor).astype(np.float64).T
    for [y], [z] in zip(fast, exact, strict=True):
        if len(y) <= 32 or not has_fast:
            assert np.array_equal(y, z)
        else:
            assert 1e-4 < relative_error(y, expected[: len(y)]) < 1.3e-2


@pytest.mark.complete
@pytest.mark.parametrize("ggml_type", FORMATS, ids=lambda t: t.name)
def test_linear_largest_codes_and_activations_overflow_nothing(kernels: Kernels, ggml_type: Type):
    """Sums of a unit reach the largest that they can be, with either sign."""
    fmt, columns = FORMATS[ggml_type], 512
    blocks = np.zeros((32, columns // fmt.columns, fmt.file_block_bytes), np.uint8)
    blocks[::2] = 255
    for i, at in enumerate(fmt.halves):
        half = np.array([1.0 if i == 0 else 0.25], "<f2")
        blocks[..., at : at + 2] = half.view(np.uint8)
    tensor = from_bytes(ggml_type, blocks.reshape(32, -1))
    signs = np.array([1, -1] * 20, np.float32)
    x = np.repeat(signs[:, None], columns, axis=1)
    expected = x.astype(np.float64) @ values(tensor).astype(np.float64).T
    for is_fast in (False, True):
        for m in (1, 3, 40):
            [[y]] = products(kernels, [x[:m]], [kernels.pack([tensor])], is_fast=is_fast)
            assert_close(y, expected[:m], 3e-6)
