"""What the author of a backend imports: the tensor protocol and what belongs to it.

This room knows nothing of the network, the engine or the text; it imports `phicore.gguf` alone.
"""

from phicore.backend.protocol import (
    DTYPES,
    FUNCTIONS,
    NUM_EXPERTS_PER_TOK,
    VERSION,
    Array,
    Backend,
    LayerCache,
    Params,
    Weight,
)

__all__ = [
    "DTYPES",
    "FUNCTIONS",
    "NUM_EXPERTS_PER_TOK",
    "VERSION",
    "Array",
    "Backend",
    "LayerCache",
    "Params",
    "Weight",
]
