"""The conformance kit's tests of selection, on every backend."""

from backend.every import EveryLibrary

from phicore.testing.conformance import SelectionConformance


class TestSelection(EveryLibrary, SelectionConformance):
    pass
