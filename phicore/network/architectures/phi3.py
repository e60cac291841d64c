"""Phi-3, Phi-3.5 and Phi-4, which have fused matrices and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phicore.errors import GGUFError
from phicore.gguf.reader import GGUFFile, GGUFTensor
from phicore.network.architectures.base import Architecture
from phicore.network.architectures.hyperparameters import Hyperparameters
from phicore.network.architectures.keys import NEUTRAL
from phicore.network.config import Phi3Config
from phicore.network.rope import RopeFactors, longrope_scale
from phicore.network.tensors import Tensors


class LongRoPE(Architecture):
    """Models with LongRoPE: short factors within the original context, long factors beyond it."""

    rotates_partly = True
    scales_linearly = False
    rope_tensors = ("rope_factors_short.weight", "rope_factors_long.weight")
    # "longrope" adds nothing: the tensors of factors already mean LongRoPE.
    neutral: Mapping[str, tuple[Any, ...]] = {
        **NEUTRAL,
        "rope.scaling.type": (*NEUTRAL["rope.scaling.type"], "longrope", "su"),
    }

    def rope_factors(self, config: Phi3Config, file: GGUFFile) -> RopeFactors | None:
        context, original = config.max_position_embeddings, config.original_max_position_embeddings
        where = file.path.name
        if not self.rope_tensors_of(file):
            if (original or context) < context or config.attention_factor not in (None, 1):
                names = " and ".join(self.rope_tensors)
                raise GGUFError(f"{where}: tensors {names} are missing")
            return None
        short, long = (self.factors(name, config, file) for name in self.rope_tensors)
        if original is None or original < 2:
            raise GGUFError(
                f"{where}: {self.name}.rope.scaling.original_context_length: expected 2 or more "
                f"with the rope factors of this file, found {original or 'nothing'}"
            )
        return RopeFactors(short, long, self.rope_scale(config, original))

    def rope_scale(self, config: Phi3Config, original: int) -> float:
        """Return the factor for sines and cosines: the file's, or that of the paper's formula."""
        if config.attention_factor is not None:
            return config.attention_factor
        return longrope_scale(config.max_position_embeddings, original)


class Phi3(LongRoPE):
    """Files in the graph's own layout.

    One matrix holds queries, keys and values. Another matrix holds gate and up.
    """

    name = "phi3"

    def default_window(self, read: Hyperparameters) -> int:
        """Return the window for an old file, which has no `attention.sliding_window`.

        Source: llama.cpp, `llama_model::load_hparams`, case LLM_ARCH_PHI3.
        """
        layers, context = read.integer("num_hidden_layers"), read.integer("max_position_embeddings")
        kv_heads = read.integer("num_key_value_heads", read.integer("num_attention_heads"))
        if layers in (32, 40) and context == 4096:
            return 2047
        if layers == 32 and kv_heads == 32 and context == 131072:
            return 262144
        if layers == 40 and kv_heads == 10 and context == 131072:
            return 131072
        return 0

    def qkv(self, config: Phi3Config, tensors: Tensors, blk: str) -> list[GGUFTensor]:
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        rows = heads * config.head_dim
        return [tensors.take(f"{blk}.attn_qkv.weight", rows, config.hidden_size)]

    def gate_up(self, config: Phi3Config, tensors: Tensors, blk: str) -> list[GGUFTensor]:
        rows = 2 * config.intermediate_size
        return [tensors.take(f"{blk}.ffn_up.weight", rows, config.hidden_size)]
