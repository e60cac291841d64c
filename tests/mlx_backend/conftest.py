"""Fixtures for tests of the MLX backend, where it differs from the protocol's defaults."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("phicore_mlx") is None or find_spec("mlx") is None:  # install phicore[mlx]
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _on_the_cpu():
    """Run operations outside of compiled functions on the CPU, whatever MLX's default device is."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
