"""The conformance kit's operations, on every backend."""

from backend.every import EveryBackend

from phicore.testing.conformance import OperationsConformance


class TestOperations(EveryBackend, OperationsConformance):
    pass
