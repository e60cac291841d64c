"""The conformance kit's tests of log probabilities, on every backend."""

from backend.every import EveryLibrary

from phicore.testing.conformance import LogprobsConformance


class TestLogprobs(EveryLibrary, LogprobsConformance):
    pass
