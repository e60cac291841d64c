"""The parts of the kit, each a class of tests of one thing, and all together."""

from phicore.testing.conformance.attention import AttentionConformance
from phicore.testing.conformance.cache_types import CacheTypesConformance
from phicore.testing.conformance.experts import ExpertsConformance
from phicore.testing.conformance.laws import LawsConformance
from phicore.testing.conformance.models import ModelsConformance
from phicore.testing.conformance.operations import OperationsConformance
from phicore.testing.conformance.products import ProductsConformance
from phicore.testing.conformance.sampling import SamplingConformance
from phicore.testing.conformance.selection import SelectionConformance


class BackendConformance(
    ModelsConformance,
    LawsConformance,
    SamplingConformance,
    SelectionConformance,
    CacheTypesConformance,
    AttentionConformance,
    ExpertsConformance,
    ProductsConformance,
    OperationsConformance,
):
    """All tests of the kit, for the backend that `make_backend` returns.

    pytest begins with the tests of the last base: from single operations to whole models.
    """


__all__ = [
    "AttentionConformance",
    "BackendConformance",
    "CacheTypesConformance",
    "ExpertsConformance",
    "LawsConformance",
    "ModelsConformance",
    "OperationsConformance",
    "ProductsConformance",
    "SamplingConformance",
    "SelectionConformance",
]
