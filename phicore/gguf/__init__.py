"""GGUF files: safe reading, and the layout and values of quantized blocks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phicore.gguf.reader import GGUFFile, GGUFTensor, open_gguf

__all__ = ["GGUFFile", "GGUFTensor", "open_gguf"]


def __getattr__(name: str) -> Any:
    """Import the reader, and NumPy and `gguf` with it, when a name is first used."""
    if name in __all__:
        from phicore.gguf import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
