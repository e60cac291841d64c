"""The conformance kit's tests of random numbers, on every backend, whether it uses them or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from backend.every import XLA, make_any
from conftest import ALL_BACKENDS

from phicore.backend import Backend, BackendOptions, philox
from phicore.testing.conformance import UniformsConformance
from phicore.testing.conformance.base import Make


class TestUniforms(UniformsConformance):
    @pytest.fixture(scope="class", params=[*ALL_BACKENDS, *XLA])
    @classmethod
    def make(cls, request: pytest.FixtureRequest) -> Make:
        def made(options: BackendOptions) -> Backend:
            ops = make_any(request.param, options)
            ops.capabilities = replace(ops.capabilities, random_on_device=True)
            return ops

        return made


def test_largest_word_gives_a_number_below_one():
    words = np.array([[2**32 - 1, 2**32 - 128, 2**32 - 129, 2**24, 2**24 + 1, 0]], np.uint32)
    found = philox._number(np, words)[0]
    exact = np.minimum(((words[0] + 0.5) * 2.0**-32).astype(np.float32), np.float32(1 - 2**-24))
    assert found.tobytes() == exact.tobytes()
    assert found.max() < 1
