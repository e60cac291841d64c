"""The base class of the kit's tests, and the settings for hypothesis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from phicore.backend import Backend, BackendOptions

Make = Callable[[BackendOptions], Backend]
"""A function that makes a backend with the given options."""
EXACT = BackendOptions(cache_type="f32")
"""Options for an exact cache."""


class Conformance:
    """Base class of tests of a backend. A subclass defines `make_backend`."""

    @classmethod
    def make_backend(cls, options: BackendOptions) -> Backend:
        """Make a new backend on the device to test."""
        raise NotImplementedError("make_backend: return the backend that is to be tested")

    @pytest.fixture(scope="class")
    @classmethod
    def make(cls) -> Make:
        """Return the function that makes a backend.

        To test several backends, override this fixture with a parametrized one.
        """
        return cls.make_backend

    @pytest.fixture(scope="class")
    @classmethod
    def ops(cls, make: Make) -> Backend:
        """Return the backend with an exact cache."""
        return make(EXACT)

    @pytest.fixture
    @classmethod
    def rng(cls) -> np.random.Generator:
        return np.random.default_rng(0)


def examples(count: int) -> Any:
    """Return hypothesis settings for `count` examples, which are the same in every run.

    There is no time limit, since the first example may have to be compiled.
    """
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )
