"""The conformance kit's tests of products, on every backend."""

import pytest
from backend.every import EveryBackend

from phicore.testing.conformance import ProductsConformance


@pytest.mark.each_value("make", "data_type")
@pytest.mark.each_value("make", "name")
class TestProducts(EveryBackend, ProductsConformance):
    pass
