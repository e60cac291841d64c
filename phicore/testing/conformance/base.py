"""What all classes of the kit share: how the backend is made, and how examples are drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from phicore.backend import Backend, BackendOptions

Make = Callable[[BackendOptions], Backend]
"""What makes a backend with some options."""
EXACT = BackendOptions(cache_type="f32")
"""Options for an exact cache."""


class Conformance:
    """Tests of a backend. A subclass says how it is made."""

    @classmethod
    def make_backend(cls, options: BackendOptions) -> Backend:
        """Make a new backend, on the device that is to be tested."""
        raise NotImplementedError("make_backend: return the backend that is to be tested")

    @pytest.fixture(scope="class")
    @classmethod
    def make(cls) -> Make:
        """Override this, with parameters, to test several backends."""
        return cls.make_backend

    @pytest.fixture(scope="class")
    @classmethod
    def ops(cls, make: Make) -> Backend:
        """The backend with an exact cache."""
        return make(EXACT)

    @pytest.fixture
    @classmethod
    def rng(cls) -> np.random.Generator:
        return np.random.default_rng(0)


def examples(count: int) -> Any:
    """So many examples, the same in every run, without a time limit: a first one is compiled."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )
