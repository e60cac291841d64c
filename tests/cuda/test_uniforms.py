"""Tests of the GPU kernel that makes random numbers, run on the CPU, against NumPy's Philox."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("jax", reason="install phicore-jax")
pytest.importorskip("llvmlite", reason="install llvmlite, for the kernels of JAX")

from cuda import host
from phicore_jax.cuda.uniforms import blocks_of, emit_uniforms, warps_of

from phicore.backend import philox
from phicore.network import sampler
from phicore.testing.conformance.uniforms import seeds, steps


def made(rows: list[tuple[int, int]], size: int) -> np.ndarray:
    operands = [
        philox.keys([seed for seed, _ in rows]),
        np.array([step for _, step in rows], np.uint32),
    ]
    result = ((len(rows), blocks_of(size) * philox.NUMBERS), np.float32)
    (found,) = host.run(
        emit_uniforms, (len(rows), size), operands, [result], warps_of(len(rows), size)
    )
    return found[:, :size]


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(seeds, steps), min_size=3, max_size=3),
    size=st.sampled_from([1, 8, 255, 1003]),
)
def test_numbers_equal_numpy_bit_for_bit(rows: list[tuple[int, int]], size: int):
    expected = np.stack([sampler.uniforms(seed, step, size) for seed, step in rows])
    assert made(rows, size).tobytes() == expected.tobytes()


@pytest.mark.parametrize("batch", [1, 8])
def test_numbers_of_a_vocabulary_equal_numpy_bit_for_bit(batch: int):
    rows = [(2**63 + 12_345 * n, 7 + n) for n in range(batch)]
    found = made(rows, 200_064)
    for row, (seed, step) in zip(found, rows, strict=True):
        assert row.tobytes() == sampler.uniforms(seed, step, 200_064).tobytes()
