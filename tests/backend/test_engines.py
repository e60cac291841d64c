"""The conformance kit's tests of the engine, on every installed backend.

tests/engine has more of them; here, backends that compile run in the complete run.
"""

import pytest
from backend.every import make_any
from conftest import BACKENDS

from phicore.testing.conformance import EnginesConformance
from phicore.testing.conformance.base import Make


class TestEngines(EnginesConformance):
    @pytest.fixture(
        scope="class",
        params=[
            name if name == "numpy" else pytest.param(name, marks=pytest.mark.complete)
            for name in BACKENDS
        ],
    )
    @classmethod
    def make(cls, request: pytest.FixtureRequest) -> Make:
        return lambda options: make_any(request.param, options)
