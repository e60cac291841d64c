"""Tests of the random numbers that a device makes, compared with those of NumPy bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.backend import Backend, philox
from phicore.network import sampler
from phicore.testing.conformance.base import Conformance, examples

SIZES = (1, 8, 13, 1000)
"""Some sizes, since each is compiled."""

near_borders = st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**32, 2**48, 2**63, 2**64 - 1])
seeds = st.one_of(near_borders, st.integers(0, 2**64 - 1))
steps = st.one_of(st.integers(0, 500), st.sampled_from([2**16, 2**31, 2**32 - 1]))


class UniformsConformance(Conformance):
    @pytest.fixture(scope="class")
    @classmethod
    def uniforms(cls, ops: Backend) -> Callable[..., np.ndarray]:
        """Return the compiled `Backend.uniforms`, for seeds and steps on the host."""
        if not ops.capabilities.random_on_device:
            pytest.skip("this backend takes the host's random numbers (random_on_device)")
        compiled: dict[int, Callable[..., Any]] = {}

        def call(seeds: Sequence[int], steps: Sequence[int], size: int) -> np.ndarray:
            if size not in compiled:
                compiled[size] = ops.compile(lambda key, step: ops.uniforms(key, step, size))
            host = philox.keys(seeds), np.array(steps, np.uint32)
            return ops.to_numpy(compiled[size](*map(ops.asarray, host)))

        return call

    @examples(100)
    @given(
        rows=st.lists(st.tuples(seeds, steps), min_size=3, max_size=3), size=st.sampled_from(SIZES)
    )
    def test_uniforms_equal_numpy_bit_for_bit(
        self, uniforms: Callable[..., np.ndarray], rows: list[tuple[int, int]], size: int
    ) -> None:
        found = uniforms(*zip(*rows, strict=True), size)
        expected = np.stack([sampler.uniforms(seed, step, size) for seed, step in rows])
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()

    @pytest.mark.parametrize("size", [49_152, 200_064, 100_003])
    def test_uniforms_of_a_vocabulary_equal_numpy_bit_for_bit(
        self, uniforms: Callable[..., np.ndarray], size: int
    ) -> None:
        found = uniforms([2**40 + 17, 3], [7, 12_345], size)
        assert found[0].tobytes() == sampler.uniforms(2**40 + 17, 7, size).tobytes()
        assert found[1].tobytes() == sampler.uniforms(3, 12_345, size).tobytes()
