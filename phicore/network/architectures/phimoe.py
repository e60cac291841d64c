"""Phi-3.5-MoE, which has experts, LayerNorm and many biases."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from typing import Any

from phicore.backend import NUM_EXPERTS_PER_TOK, Params
from phicore.errors import GGUFError
from phicore.gguf.matrix import Split
from phicore.network.architectures.hyperparameters import Hyperparameters, short
from phicore.network.architectures.keys import READ
from phicore.network.architectures.phi3 import LongRoPE
from phicore.network.architectures.qwen2 import qkv_bias
from phicore.network.config import Phi3Config
from phicore.network.rope import longrope_scale
from phicore.network.tensors import Tensors

PHI_3_5_MOE_SCALE = 1.243163121016122  # `short_mscale` and `long_mscale` in the model's config.json


class PhiMoE(LongRoPE):
    """Files with separate matrices, biases, and a router with experts in place of one `mlp`."""

    name = "phimoe"
    keys: Mapping[str, str] = {
        **READ,
        "num_local_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
    }
    may_tie_embeddings = False

    def experts(self, read: Hyperparameters) -> int:
        count, expected = read.integer("num_local_experts"), NUM_EXPERTS_PER_TOK
        chosen = read.metadata.get(read.key("num_experts_per_tok"))
        if not isinstance(chosen, int) or chosen != expected or count < expected:
            raise GGUFError(
                f"{read.key('num_experts_per_tok')}: expected {expected} of {expected} or more "
                f"experts ({read.key('num_local_experts')}), found {short(chosen)} of {count}"
            )
        return count

    def rope_scale(self, config: Phi3Config, original: int) -> float:
        """Return the factor for sines and cosines, with a correction for Phi-3.5-MoE.

        Phi-3.5-MoE was trained with a scale of its own, but llama.cpp's converter writes the value
        of the formula into its files.
        """
        context = config.max_position_embeddings
        scale = super().rope_scale(config, original)
        is_by_formula = isclose(scale, longrope_scale(context, original), rel_tol=1e-6)
        is_phi_3_5_moe = (original, context) == (4096, 131072)
        return PHI_3_5_MOE_SCALE if is_phi_3_5_moe and is_by_formula else scale

    def params(self, config: Phi3Config, tensors: Tensors) -> Params:
        e, v = config.hidden_size, config.vocab_size
        return {
            **super().params(config, tensors),
            "norm_bias": tensors.vector({"output_norm.bias": e}),
            "lm_head_bias": tensors.vector({"output.bias": v}),
        }

    def layer(self, config: Phi3Config, tensors: Tensors, blk: str) -> dict[str, Any]:
        e = config.hidden_size
        return super().layer(config, tensors, blk) | {
            "input_layernorm_bias": tensors.vector({f"{blk}.attn_norm.bias": e}),
            "post_attention_layernorm_bias": tensors.vector({f"{blk}.ffn_norm.bias": e}),
        }

    def attention(self, config: Phi3Config, tensors: Tensors, blk: str) -> dict[str, Any]:
        bias = {f"{blk}.attn_output.bias": config.hidden_size}
        return {
            **super().attention(config, tensors, blk),
            **qkv_bias(config, tensors, blk),
            "o_proj_bias": tensors.vector(bias),
        }

    def mlp(self, config: Phi3Config, tensors: Tensors, blk: str) -> dict[str, Any]:
        e, f, x = config.hidden_size, config.intermediate_size, config.num_local_experts
        gate_up = [
            tensors.take(f"{blk}.ffn_{part}_exps.weight", x, f, e) for part in ("gate", "up")
        ]
        down = tensors.take(f"{blk}.ffn_down_exps.weight", x, e, f)
        return {
            "router": tensors.matrix(f"{blk}.ffn_gate_inp.weight", x, e),
            "experts_gate_up_proj": tensors.load_experts(
                "experts_gate_up_proj", *gate_up, split=Split((f, f))
            ),
            "experts_down_proj": tensors.load_experts("experts_down_proj", down, split=Split()),
        }
