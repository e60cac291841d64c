"""The supported architectures: families of GGUF files, one module each.

All of them hold the network of `graph.py`. They differ in the names of keys and tensors, in which
matrices are fused, and in which channels are rotated together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from phicore.errors import GGUFError
from phicore.network.architectures.base import Architecture
from phicore.network.architectures.hyperparameters import short
from phicore.network.architectures.kinds import is_of_llama_cpp, other_kind
from phicore.network.architectures.llama import Llama
from phicore.network.architectures.phi3 import Phi3
from phicore.network.architectures.phimoe import PhiMoE
from phicore.network.architectures.qwen2 import Qwen2

__all__ = ["BUILT_IN", "Architecture", "architecture_of"]

BUILT_IN: Mapping[str, Architecture] = {a.name: a for a in (Phi3(), PhiMoE(), Llama(), Qwen2())}


def architecture_of(
    metadata: Mapping[str, Any],
    known: Mapping[str, Architecture] = BUILT_IN,
    *,
    tensors: Collection[str] = ("token_embd.weight",),
) -> Architecture:
    """Return the architecture of a file.

    Args:
        metadata: The metadata of the file.
        known: The architectures by name. Plugins may have added some.
        tensors: The names of the file's tensors.
    Raises:
        GGUFError: If the file is no language model, or names no architecture or an unknown one.
    """
    name = metadata.get("general.architecture")
    if kind := other_kind(metadata, tensors, known):
        raise GGUFError(f"this file is {kind}")
    if name is None:
        raise GGUFError("general.architecture: missing; is this a model file?")
    if not isinstance(name, str) or name not in known:
        is_known = isinstance(name, str) and is_of_llama_cpp(name)
        hint = "; llama.cpp runs this file" if is_known else ""
        raise GGUFError(
            f"general.architecture: {short(name)} is not supported "
            f"(supported: {', '.join(known)}){hint}"
        )
    return known[name]
