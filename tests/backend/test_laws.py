"""The conformance kit's tests of laws, on every backend."""

import pytest
from backend.every import EveryBackend

from phicore.testing.conformance import LawsConformance


@pytest.mark.each_value("make", "kv_heads")
class TestLaws(EveryBackend, LawsConformance):
    pass
