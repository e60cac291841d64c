"""Fixtures for the tests of backends."""

from __future__ import annotations

import sys

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _no_fused_kernels():
    """Switch off MLX's fused kernels, which other tests use.

    On a CPU, MLX has a C++ compiler make them, which takes a second for each.
    """
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
