"""Fixtures: the JAX backend's kernels for every instruction set that this processor supports."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from phicore_jax.kernels.runtime import Kernels

HAS_KERNELS = find_spec("phicore_jax") is not None and find_spec("llvmlite") is not None

if not HAS_KERNELS:  # install phicore[jax]
    collect_ignore_glob = ["test_*.py"]


def _targets() -> list[str]:
    if not HAS_KERNELS:
        return []
    from phicore_jax.kernels.build import supported_targets

    return supported_targets()


@pytest.fixture(scope="session", params=_targets())
def target(request: pytest.FixtureRequest) -> str:
    """Return each instruction set in turn, the fastest first."""
    return request.param


@pytest.fixture(scope="session")
def kernels(target: str) -> Kernels:
    """Return the kernels of each instruction set in turn, with two threads."""
    from kernels.made import kernels_of

    return kernels_of(target)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
