"""The conformance kit's experts, on every backend."""

from backend.every import EveryBackend

from phicore.testing.conformance import ExpertsConformance


class TestExperts(EveryBackend, ExpertsConformance):
    pass
