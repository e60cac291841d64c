"""A kit for those who write backends: it tells when one is right.

    from phicore.testing import BackendConformance

    class TestMine(BackendConformance):
        @classmethod
        def make_backend(cls, options):
            return MyBackend(options)

Every operation is compared with float64 over many shapes, every quantization type with the gguf
package, whole models with the protocol's defaults on NumPy; and the laws that the engine relies on
are tried with examples by hypothesis. It needs `phicore[testing]`; `tiny_models` does not.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phicore.testing.conformance import BackendConformance

__all__ = ["BackendConformance"]

if "pytest" in sys.modules:  # asserts then say what they compared
    import pytest

    pytest.register_assert_rewrite("phicore.testing.conformance")


def __getattr__(name: str) -> Any:
    if name != "BackendConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from phicore.testing.conformance import BackendConformance

    return BackendConformance
