"""The conformance kit's tests of experts, on every backend."""

import pytest
from backend.every import EveryBackend

from phicore.testing.conformance import ExpertsConformance


@pytest.mark.each_value("make", "types")
class TestExperts(EveryBackend, ExpertsConformance):
    pass
