"""Settings of the tests of backends."""

from __future__ import annotations

import sys

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _no_fused_kernels():
    """MLX has a C++ compiler make these on a CPU, a second each; other tests use them."""
    mlx = sys.modules.get("mlx.core")
    if mlx is None:
        yield
        return
    mlx.disable_compile()
    yield
    mlx.enable_compile()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
