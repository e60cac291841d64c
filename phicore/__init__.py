"""Runs Phi-3 from quantized GGUF files on any tensor library.

All backends share one graph and one sampler.

    import phicore

    with phicore.load("phi-3-mini") as model:
        for piece in model.generate("Write a haiku about ice hockey"):
            print(piece.text, end="", flush=True)

Importing this package imports no tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phicore.errors import (
    ArgumentError,
    BackendError,
    ContextError,
    GGUFError,
    PhicoreError,
    SourceError,
    TokenizerError,
)

if TYPE_CHECKING:
    from phicore.generation import Generation
    from phicore.loading import join, load
    from phicore.model import Model
    from phicore.network.processors import LogitsProcessor
    from phicore.network.sampling import Sampling
    from phicore.plugins import BackendInfo
    from phicore.plugins.hookspecs import hookimpl
    from phicore.text.logprobs import TokenLogprobs
    from phicore.text.pieces import Piece

__all__ = [
    "ArgumentError",
    "BackendError",
    "BackendInfo",
    "ContextError",
    "GGUFError",
    "Generation",
    "LogitsProcessor",
    "Model",
    "PhicoreError",
    "Piece",
    "Sampling",
    "SourceError",
    "TokenLogprobs",
    "TokenizerError",
    "backends",
    "hookimpl",
    "join",
    "load",
]

_LAZY = {
    "BackendInfo": "phicore.plugins",
    "Generation": "phicore.generation",
    "LogitsProcessor": "phicore.network.processors",
    "Model": "phicore.model",
    "Piece": "phicore.text.pieces",
    "Sampling": "phicore.network.sampling",
    "TokenLogprobs": "phicore.text.logprobs",
    "hookimpl": "phicore.plugins.hookspecs",
    "join": "phicore.loading",
    "load": "phicore.loading",
}


def backends() -> list[BackendInfo]:
    """Return the installed backends, the preferred one first, without importing their libraries."""
    from phicore.plugins import Plugins

    return list(Plugins().backends().values())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # takes 0.03 s; `phicore --help` does not need it

        return version("phicore")
    if name not in _LAZY:
        raise AttributeError(f"module 'phicore' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
