"""The MLX backend: what it does otherwise than the protocol's defaults."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

if find_spec("phicore_mlx") is None or find_spec("mlx") is None:  # install phicore[mlx]
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _on_the_cpu():
    """Operations that a test calls by themselves run there, whatever MLX's default device is."""
    import mlx.core as mx

    with mx.stream(mx.cpu):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
