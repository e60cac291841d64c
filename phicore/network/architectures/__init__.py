"""The supported architectures: families of GGUF files, one module each.

All of them hold the network of `graph.py`. They differ in the names of keys and tensors, in which
matrices are fused, and in which channels are rotated together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phicore.errors import GGUFError
from phicore.network.architectures.base import Architecture
from phicore.network.architectures.hyperparameters import short
from phicore.network.architectures.llama import Llama
from phicore.network.architectures.phi3 import Phi3
from phicore.network.architectures.phimoe import PhiMoE
from phicore.network.architectures.qwen2 import Qwen2

__all__ = ["BUILT_IN", "Architecture", "architecture_of"]

BUILT_IN: Mapping[str, Architecture] = {a.name: a for a in (Phi3(), PhiMoE(), Llama(), Qwen2())}


def architecture_of(
    metadata: Mapping[str, Any], known: Mapping[str, Architecture] = BUILT_IN
) -> Architecture:
    """Return the architecture that a file names.

    Args:
        metadata: The file's metadata.
        known: The supported architectures by name; plugins may add some.
    Raises:
        GGUFError: If the file names no architecture, or an unsupported one.
    """
    name = metadata.get("general.architecture")
    if name is None:
        raise GGUFError("general.architecture: missing; is this a model file?")
    if not isinstance(name, str) or name not in known:
        raise GGUFError(
            f"general.architecture: {short(name)} is not supported (supported: {', '.join(known)})"
        )
    return known[name]
