"""Qwen2 and Qwen2.5, which have biases for queries, keys and values."""

from __future__ import annotations

from typing import Any

from phicore.network.architectures.base import Architecture, qkv_rows
from phicore.network.config import Phi3Config
from phicore.network.tensors import Tensors


class Qwen2(Architecture):
    """Files with separate matrices, and with biases for queries, keys and values."""

    name = "qwen2"
    rope_tensors = ()

    def attention(self, config: Phi3Config, tensors: Tensors, blk: str) -> dict[str, Any]:
        return super().attention(config, tensors, blk) | qkv_bias(config, tensors, blk)


def qkv_bias(config: Phi3Config, tensors: Tensors, blk: str) -> dict[str, Any]:
    """Load the biases of queries, keys and values as the bias of `qkv_proj`."""
    sizes = {f"{blk}.attn_{part}.bias": rows for part, rows in qkv_rows(config).items()}
    return {"qkv_proj_bias": tensors.vector(sizes, is_split=True)}
