"""The conformance tests run on every installed backend, and on one that has only the list."""

from __future__ import annotations

import numpy as np
import pytest
from backend.strict import StrictBackend
from conftest import BACKENDS, make_backend

from phicore.protocol import Backend


@pytest.fixture(scope="session", params=[*BACKENDS, "strict"])
def ops(request: pytest.FixtureRequest) -> Backend:
    """Each installed backend in turn, then array-api-strict behind the protocol's list."""
    return StrictBackend() if request.param == "strict" else make_backend(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
