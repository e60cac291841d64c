"""The hyperparameters of GGUF files: which are read, which repeat others, and which are refused.

Names are what stands behind the architecture's name: `attention.head_count` for
`llama.attention.head_count`. A file may come from any converter, and a key that nobody here knows
might change the network, so it is an error. A test compares these tables with the `gguf` package,
so that a new version of the package shows what is new.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

READ: Mapping[str, str] = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "rotary_dim": "rope.dimension_count",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.attn_factor",
    "rope_scaling_factor": "rope.scaling.factor",
    "rope_scale_linear": "rope.scale_linear",  # the name of `rope.scaling.factor` in old files
}
"""Keys that an architecture reads, by their names in the reference's configuration."""

REPEATED: Mapping[str, str] = {
    "attention.value_length": "head_dim",
    "attention.head_dim": "head_dim",  # of ollama's converter
    "attention.key_length_swa": "head_dim",
    "attention.scale": "attention_scale",
    "attention.value_length_swa": "head_dim",
    "attention.layer_norm_epsilon": "rms_norm_eps",
    "rope.dimension_count_swa": "rotary_dim",
    "rope.freq_base_swa": "rope_theta",
    "embedding_length_out": "hidden_size",
    "features_length": "hidden_size",
    "expert_feed_forward_length": "intermediate_size",
}
"""Keys that repeat a field of the configuration. They may be 0, which means that they say nothing;
another value is a contradiction."""

HARMLESS = frozenset(
    {
        "vocab_size",  # the embedding has it
        "tensor_data_layout",  # a remark of the first converters
        "rope.scaling.finetuned",
        # YaRN's parameters have no effect without YaRN, which `rope.scaling.type` asks for.
        "rope.scaling.yarn_log_multiplier",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    }
)
"""Keys that change nothing, whatever their value."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window_pattern": (0, 1),  # every layer has the window
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attention.value_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "decoder_block_count": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),  # 1 is softmax
    "expert_group_count": (0, 1),
    "expert_group_scale": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (False,),
    "expert_weights_scale": (0, 1),
    "experts_per_group": (0,),
    "final_logit_softcapping": (0,),
    "full_attention_interval": (0, 1),
    "interleave_moe_layer_step": (0, 1),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "n_deepstack_layers": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),  # 0 is none: the model is not one for embeddings
    "residual_scale": (0, 1),
    "rope.dimension_sections": (0,),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.type": ("none", "", "linear", "yarn"),  # without a factor, all are none
    "rope.scaling.yarn_ext_factor": (0, -1),
    "router_logit_softcapping": (0,),
    "swin_norm": (False,),
    "token_shift_count": (0,),
    "use_parallel_residual": (False,),
}
"""Keys that change nothing if they have one of these values. An array of them changes nothing,
either."""

REFUSED: Mapping[str, tuple[str, ...]] = {
    "another kind of network": (
        *("activation_sparsity_scale", "altup.active_idx", "altup.num_inputs", "block_size"),
        *("conv_group_size", "conv_kernel_size", "decoder_start_token_id", "deepstack_mapping"),
        *("embedding_length_per_layer_input", "hash_layer_count", "hidden_activation"),
        *("moe_latent_size", "norm_before_fc", "norm_before_residual", "num_loops"),
        *("rescale_every_n_layers", "sample_from_anchor", "selector_rank", "selector_top_k"),
        *("skip_loop_final_norm", "swiglu_clamp_exp", "swiglu_clamp_shexp", "target_hidden_size"),
        *("target_layers", "time_decay_extra_dim", "time_mix_extra_dim", "has_confidence_head"),
        *("expert_chunk_feed_forward_length", "expert_latent_length"),
        *("{dense}_feat_in", "{dense}_feat_out"),
    ),
    "another kind of attention": (
        *("attention.compress_ratios", "attention.compress_rope_freq_base"),
        *("attention.decay_lora_rank", "attention.gate_lora_rank", "attention.iclr_lora_rank"),
        *("attention.group_norm_epsilon", "attention.group_norm_groups"),
        *("attention.indexer.block_size", "attention.indexer.head_count"),
        *("attention.indexer.key_length", "attention.indexer.kpool"),
        *("attention.indexer.kpool_select_tail", "attention.indexer.local_blocks"),
        *("attention.indexer.top_k", "attention.indexer.types"),
        *("attention.key_length_mla", "attention.key_length_mla_swa", "attention.kv_lora_rank"),
        *("attention.kv_lora_rank_swa", "attention.output_group_count"),
        *("attention.output_lora_rank", "attention.q_lora_rank", "attention.recurrent_layers"),
        *("attention.relative_buckets_count", "attention.rope_pattern"),
        *("attention.value_length_mla", "attention.value_length_mla_swa"),
        "attention.value_residual_mix_lora_rank",
    ),
}
"""Keys of other networks, by what they stand for. An architecture of a plugin may read them."""

ELSEWHERE = (
    *("activation", "adapters", "attn_res", "classifier", "convnext", "hrm", "hyper_connection"),
    *("kda", "ple", "posnet", "shortconv", "ssm", "wkv"),
)
"""Groups of keys, such as `ssm.conv_kernel`, that belong to other kinds of networks."""


def why_refused(name: str) -> str:
    """Say why a key is not supported, for a message."""
    if name.partition(".")[0] in ELSEWHERE:
        return "this hyperparameter is not supported: it belongs to another kind of network"
    for kind, names in REFUSED.items():
        if name in names:
            return f"this hyperparameter is not supported: it belongs to {kind}"
    return "this hyperparameter is not known; it might change the network"
