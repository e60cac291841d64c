"""The conformance kit's tests of sampling, on every backend."""

from backend.every import EveryLibrary

from phicore.testing.conformance import SamplingConformance


class TestSampling(EveryLibrary, SamplingConformance):
    pass
