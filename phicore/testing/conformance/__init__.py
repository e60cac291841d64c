"""The parts of the conformance kit, which are classes of tests, and a class with all tests."""

from phicore.testing.conformance.attention import AttentionConformance
from phicore.testing.conformance.cache_types import CacheTypesConformance
from phicore.testing.conformance.engines import EnginesConformance
from phicore.testing.conformance.experts import ExpertsConformance
from phicore.testing.conformance.laws import LawsConformance
from phicore.testing.conformance.logprobs import LogprobsConformance
from phicore.testing.conformance.models import ModelsConformance
from phicore.testing.conformance.operations import OperationsConformance
from phicore.testing.conformance.products import ProductsConformance
from phicore.testing.conformance.sampling import SamplingConformance
from phicore.testing.conformance.selection import SelectionConformance
from phicore.testing.conformance.uniforms import UniformsConformance


class BackendConformance(
    EnginesConformance,
    ModelsConformance,
    LawsConformance,
    LogprobsConformance,
    SamplingConformance,
    SelectionConformance,
    UniformsConformance,
    CacheTypesConformance,
    AttentionConformance,
    ExpertsConformance,
    ProductsConformance,
    OperationsConformance,
):
    """All tests of the kit, for the backend that `make_backend` returns.

    pytest runs the tests of the last base class first. So the order is from single operations to
    whole models.
    """


__all__ = [
    "AttentionConformance",
    "BackendConformance",
    "CacheTypesConformance",
    "EnginesConformance",
    "ExpertsConformance",
    "LawsConformance",
    "LogprobsConformance",
    "ModelsConformance",
    "OperationsConformance",
    "ProductsConformance",
    "SamplingConformance",
    "SelectionConformance",
    "UniformsConformance",
]
