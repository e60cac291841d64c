"""The conformance kit's tests of cache types, on every backend."""

import pytest
from backend.every import EveryBackend

from phicore.testing.conformance import CacheTypesConformance


@pytest.mark.each_value("case", "size")
@pytest.mark.each_value("make", "case")
class TestCacheTypes(EveryBackend, CacheTypesConformance):
    pass
