"""The conformance kit's tests of attention, on every backend."""

from backend.every import EveryBackend

from phicore.testing.conformance import AttentionConformance


class TestAttention(EveryBackend, AttentionConformance):
    pass
