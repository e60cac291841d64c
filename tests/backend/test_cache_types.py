"""The conformance kit's cache types, on every backend."""

from backend.every import EveryBackend

from phicore.testing.conformance import CacheTypesConformance


class TestCacheTypes(EveryBackend, CacheTypesConformance):
    pass
