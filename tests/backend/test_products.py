"""The conformance kit's products, on every backend."""

from backend.every import EveryBackend

from phicore.testing.conformance import ProductsConformance


class TestProducts(EveryBackend, ProductsConformance):
    pass
