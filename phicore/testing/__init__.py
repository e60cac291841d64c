"""The conformance kit, which tests whether a backend is correct.

    from phicore.testing import BackendConformance

    class TestMine(BackendConformance):
        @classmethod
        def make_backend(cls, options):
            return MyBackend(options)

The kit compares every operation with float64 over many shapes, every quantization type with the
gguf package, and whole models with the protocol's default operations on NumPy. It also tests the
laws that the engine relies on, with examples that hypothesis generates, and that a text is the same
alone and in a crowd, after a saved session, and with guesses that one step checks. The kit needs
`phicore[testing]`; the modules `tiny_models` and `reference` alone do not.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phicore.testing.conformance import BackendConformance

__all__ = ["BackendConformance"]

if "pytest" in sys.modules:  # pytest then shows the compared values of a failed assert
    import pytest

    pytest.register_assert_rewrite("phicore.testing.conformance")


def __getattr__(name: str) -> Any:
    if name != "BackendConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from phicore.testing.conformance import BackendConformance

    return BackendConformance
