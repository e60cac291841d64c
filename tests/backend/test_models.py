"""The conformance kit's tests of models, on every installed backend."""

import pytest
from backend.every import make_any
from conftest import BACKENDS

from phicore.testing.conformance import ModelsConformance
from phicore.testing.conformance.base import Make


@pytest.mark.each_value("make", "model")
class TestModels(ModelsConformance):
    @pytest.fixture(
        scope="class",
        params=[*BACKENDS, pytest.param("array-api-strict", marks=pytest.mark.complete)],
    )
    @classmethod
    def make(cls, request: pytest.FixtureRequest) -> Make:
        return lambda options: make_any(request.param, options)
