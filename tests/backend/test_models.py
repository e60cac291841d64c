"""The conformance kit's models, on every installed backend."""

from collections.abc import Callable

import pytest
from backend.every import make_any
from conftest import ALL_BACKENDS

from phicore.backend import Backend
from phicore.testing.conformance import ModelsConformance


class TestModels(ModelsConformance):
    @pytest.fixture(scope="class", params=ALL_BACKENDS)
    @classmethod
    def make(cls, request: pytest.FixtureRequest) -> Callable[[], Backend]:
        return lambda: make_any(request.param)
