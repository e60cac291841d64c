"""The conformance kit's sampling, on every backend."""

from backend.every import EveryBackend

from phicore.testing.conformance import SamplingConformance


class TestSampling(EveryBackend, SamplingConformance):
    pass
