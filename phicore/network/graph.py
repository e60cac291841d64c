"""The Phi-3 network, written once for all backends.

It computes what transformers' `Phi3Model` and `PhimoeModel` compute. Axes are named as in
`protocol.py`.

`params` uses the names of the reference's weights. The name of a bias ends in `_bias`; models
without that bias leave it out. A layer with a `router` has experts in place of one `mlp`.

Source: Abdin et al., "Phi-3 Technical Report" (2024).
"""

from __future__ import annotations

from typing import Any

from phicore.backend import NUM_EXPERTS_PER_TOK, Array, Backend, LayerCache, Params
from phicore.network.config import Phi3Config

NAMES = ("embed_tokens", "layers", "norm", "lm_head")
LAYER_NAMES = (
    *("input_layernorm", "qkv_proj", "o_proj", "post_attention_layernorm"),
    *("gate_up_proj", "down_proj", "router", "experts_gate_up_proj", "experts_down_proj"),
)
WITHOUT_BIAS = {"embed_tokens", "layers", "router", "experts_gate_up_proj", "experts_down_proj"}

ROUTER_JITTER_NOISE = 0.01  # the same for every `phimoe` model; GGUF files do not store it


def forward(
    ops: Backend,
    config: Phi3Config,
    params: Params,
    rope: tuple[Array, Array],
    tokens: Array,
    slots: Array,
    cache: list[LayerCache],
) -> tuple[Array, list[LayerCache]]:
    """Run new tokens through all layers.

    Args:
        rope: Cosines and sines, (B, T, R) float32, of the angles at the tokens' positions.
        tokens: Token ids, (B, T) int32.
        slots: The slots of the cache in which the tokens are stored, (B, T) int32, consecutive in
            each row. A row may end in padding tokens. Their results are garbage, and no token sees
            their cache entries before these are overwritten.
        cache: The cache of each layer, which holds all earlier tokens.
    Returns:
        The last hidden states, (B, T, E), and the cache with the new tokens.
    """
    x = ops.embedding(tokens, params["embed_tokens"])
    new_cache = []
    for layer, layer_cache in zip(params["layers"], cache, strict=True):
        x, layer_cache = decoder_layer(ops, config, layer, x, rope, slots, layer_cache)
        new_cache.append(layer_cache)
    return norm(ops, config, params, "norm", x), new_cache


def logits(ops: Backend, params: Params, hidden: Array) -> Array:
    """Compute the scores of the next token: (..., E) gives (..., V) float32."""
    return linear(ops, params, "lm_head" if "lm_head" in params else "embed_tokens", hidden)


def linear(ops: Backend, params: Params, name: str, x: Array) -> Array:
    """Compute x @ weight.T + bias: (..., K) gives (..., N)."""
    return with_bias(ops, params, name, ops.linear(x, params[name]))


def with_bias(ops: Backend, params: Params, name: str, y: Array) -> Array:
    """Add the bias of the matrix `name` to its product y, if the matrix has a bias."""
    bias = params.get(f"{name}_bias")
    return y if bias is None else y + ops.xp.broadcast_to(bias, y.shape)


def norm(ops: Backend, config: Phi3Config, params: Params, name: str, x: Array) -> Array:
    """Apply RMSNorm over (..., E), or LayerNorm if the norm has a bias."""
    eps, bias = config.rms_norm_eps, params.get(f"{name}_bias")
    if bias is None:
        return ops.rms_norm(x, params[name], eps)
    return ops.layer_norm(x, params[name], bias, eps)


def norm_linear(
    ops: Backend, config: Phi3Config, params: Params, norm_name: str, name: str, x: Array
) -> Array:
    """Compute linear(norm(x)): (..., E) gives (..., N)."""
    if f"{norm_name}_bias" in params:
        return linear(ops, params, name, norm(ops, config, params, norm_name, x))
    y = ops.rms_norm_linear(x, params[norm_name], config.rms_norm_eps, params[name])
    return with_bias(ops, params, name, y)


def decoder_layer(
    ops: Backend,
    config: Phi3Config,
    layer: Params,
    x: Array,
    rope: tuple[Array, Array],
    slots: Array,
    cache: LayerCache,
) -> tuple[Array, LayerCache]:
    """Compute x + attention(norm(x)), then x + mlp(norm(x)); x is (B, T, E)."""
    h, cache = attention(ops, config, layer, x, rope, slots, cache)
    x = x + h
    feed_forward = experts if "router" in layer else mlp
    return x + feed_forward(ops, config, layer, x), cache


def attention(
    ops: Backend,
    config: Phi3Config,
    layer: Params,
    x: Array,
    rope: tuple[Array, Array],
    slots: Array,
    cache: LayerCache,
) -> tuple[Array, LayerCache]:
    """Compute grouped-query self-attention of norm(x), and store the new keys and values.

    The attention is causal, optionally within a window, and uses rotary positions.
    """
    xp = ops.xp
    b, t, _ = x.shape
    h, k, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    qkv = norm_linear(ops, config, layer, "input_layernorm", "qkv_proj", x)
    qkv = xp.reshape(qkv, (b, t, h + 2 * k, d))
    rotated = ops.rope(qkv[:, :, : h + k, :], *rope)
    query = xp.permute_dims(rotated[:, :, :h, :], (0, 2, 1, 3))  # (B, H, T, D)
    key = xp.permute_dims(rotated[:, :, h:, :], (0, 2, 1, 3))  # (B, K, T, D)
    value = xp.permute_dims(qkv[:, :, h + k :, :], (0, 2, 1, 3))  # (B, K, T, D)

    cache = ops.update_cache(cache, key, value, slots)
    out = ops.attention(query, cache, slots, config.attention_scale, config.sliding_window)
    out = xp.reshape(xp.permute_dims(out, (0, 2, 1, 3)), (b, t, h * d))
    return linear(ops, layer, "o_proj", out), cache


def mlp(ops: Backend, config: Phi3Config, layer: Params, x: Array) -> Array:
    """Compute down(silu(gate(norm(x))) * up(norm(x))), with gate and up in one matrix."""
    gate_up = norm_linear(ops, config, layer, "post_attention_layernorm", "gate_up_proj", x)
    down = ops.swiglu_linear(gate_up, layer["down_proj"])
    return with_bias(ops, layer, "down_proj", down)


def experts(ops: Backend, config: Phi3Config, layer: Params, x: Array) -> Array:
    """Compute the weighted sum of two experts, which the router chooses for each token."""
    xp = ops.xp
    x = norm(ops, config, layer, "post_attention_layernorm", x)
    flat = xp.reshape(x, (-1, x.shape[-1]))  # (M, E)
    chosen, weights = sparse_mixer(xp, ops.linear(flat, layer["router"]))
    m, a = chosen.shape
    rows = xp.broadcast_to(xp.expand_dims(flat, axis=1), (m, a, flat.shape[1]))
    rows, chosen = xp.reshape(rows, (m * a, -1)), xp.reshape(chosen, (-1,))
    h = ops.swiglu(ops.expert_linear(rows, chosen, layer["experts_gate_up_proj"]))
    y = ops.expert_linear(h, chosen, layer["experts_down_proj"])
    y = xp.reshape(y, (m, a, -1)) * xp.expand_dims(weights, axis=2)
    return xp.reshape(xp.sum(y, axis=1), x.shape)


def sparse_mixer(xp: Any, scores: Array) -> tuple[Array, Array]:
    """Choose two experts for each token, and their weights, which need not sum to 1.

    The first choice is the best expert, the second the best of the others. The weight of a choice
    is its probability in a softmax over the experts with scores near its own; the second softmax
    leaves the first choice out.

    Source: Liu et al., "GRIN: GRadient-INformed MoE" (2024); transformers' `sparsemixer`.

    Args:
        scores: The router's scores, (M, X) float32.
    Returns:
        The experts, (M, 2) int32, and their weights, (M, 2) float32.
    """
    numbers = xp.arange(scores.shape[1], dtype=xp.int32)[None, :]
    left, chosen, weights = scores, [], []
    for _ in range(NUM_EXPERTS_PER_TOK):
        best = xp.max(left, axis=1, keepdims=True)
        index = xp.astype(xp.argmax(left, axis=1, keepdims=True), xp.int32)
        distance = best - scores
        is_near = distance <= 2 * ROUTER_JITTER_NOISE * xp.maximum(xp.abs(scores), best)
        power = xp.exp(xp.where(is_near, left, -float("inf")) - best)
        weights.append(1 / xp.sum(power, axis=1, keepdims=True))
        chosen.append(index)
        left = xp.where(numbers == index, -float("inf"), left)
    return xp.concat(chosen, axis=1), xp.concat(weights, axis=1)
