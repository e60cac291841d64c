"""The tensor protocol and everything else that the author of a backend imports.

This package knows nothing of the network, the engine or the text. Of phicore's packages it imports
`phicore.gguf` alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phicore.backend.options import DEFAULTS, SIMPLEST, BackendOptions, Capabilities, ProcessGroup

if TYPE_CHECKING:
    from phicore.backend.protocol import (
        DTYPES,
        FUNCTIONS,
        NUM_EXPERTS_PER_TOK,
        VERSION,
        Array,
        Backend,
        KeptProgram,
        LayerCache,
        Params,
        ProgramStore,
        Weight,
    )

__all__ = [
    "DEFAULTS",
    "DTYPES",
    "FUNCTIONS",
    "NUM_EXPERTS_PER_TOK",
    "SIMPLEST",
    "VERSION",
    "Array",
    "Backend",
    "BackendOptions",
    "Capabilities",
    "KeptProgram",
    "LayerCache",
    "Params",
    "ProcessGroup",
    "ProgramStore",
    "Weight",
]


def __getattr__(name: str) -> Any:
    """Import the protocol, and NumPy with it, when a name is first used.

    Help texts need only the options, so they do not wait for NumPy.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from phicore.backend import protocol

    return getattr(protocol, name)
