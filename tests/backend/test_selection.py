"""The conformance kit's selection, on every backend."""

from backend.every import EveryBackend

from phicore.testing.conformance import SelectionConformance


class TestSelection(EveryBackend, SelectionConformance):
    pass
