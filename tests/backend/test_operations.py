"""The conformance kit's tests of operations, on every backend."""

from dataclasses import replace

import pytest
from backend.every import EveryBackend

from phicore.testing.conformance import OperationsConformance
from phicore.testing.conformance.base import Conformance, Make


class TestOperations(EveryBackend, OperationsConformance):
    pass


class TestStepsInACall(Conformance):
    """Tests of JAX when a call runs several decode steps, in a compiled loop."""

    @pytest.fixture(scope="class")
    @classmethod
    def make(cls) -> Make:
        backend = pytest.importorskip("phicore_jax.backend", reason="install phicore-jax")
        return lambda options: backend.JaxBackend(
            replace(options, device="cpu"), kernels=None, steps=5
        )

    test_while_loop = OperationsConformance.test_while_loop_ends_when_the_condition_is_false
