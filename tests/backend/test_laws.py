"""The conformance kit's laws, on every backend."""

from backend.every import EveryBackend

from phicore.testing.conformance import LawsConformance


class TestLaws(EveryBackend, LawsConformance):
    pass
