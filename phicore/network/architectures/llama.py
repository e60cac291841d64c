"""Llama, Mistral and SmolLM, whose queries and keys have the row order of interleaved rotation."""

from __future__ import annotations

from dataclasses import replace

from phicore.gguf.reader import GGUFTensor
from phicore.network.architectures.base import Architecture
from phicore.network.config import Phi3Config
from phicore.network.tensors import Tensors


class Llama(Architecture):
    """Files with separate matrices, and with rows of queries and keys that must be reordered."""

    name = "llama"

    def qkv(self, config: Phi3Config, tensors: Tensors, blk: str) -> list[GGUFTensor]:
        q, k, v = super().qkv(config, tensors, blk)
        return [
            rows_for_half_rotation(q, config.num_attention_heads),
            rows_for_half_rotation(k, config.num_key_value_heads),
            v,
        ]


def rows_for_half_rotation(tensor: GGUFTensor, heads: int) -> GGUFTensor:
    """Reorder rows from interleaved rotation, pairs (2i, 2i + 1), to pairs (i, i + D/2).

    Source: the inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows = tensor.data.reshape(heads, -1, 2, tensor.data.shape[-1])  # (heads, D/2, 2, bytes)
    return replace(tensor, data=rows.swapaxes(1, 2).reshape(tensor.data.shape))
