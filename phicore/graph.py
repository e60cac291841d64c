"""The Phi-3 network, once, for every backend.

Abdin et al., "Phi-3 Technical Report" (2024); the same computation as transformers' `Phi3Model`.
Axes as in `protocol.py`. `params` has the names of the reference's weights.
"""

from __future__ import annotations

from phicore.config import Phi3Config
from phicore.protocol import Array, Backend, LayerCache, Params


def forward(
    ops: Backend,
    config: Phi3Config,
    params: Params,
    rope: tuple[Array, Array],
    tokens: Array,
    positions: Array,
    cache: list[LayerCache],
) -> tuple[Array, list[LayerCache]]:
    """Run new tokens through all the layers.

    Args:
        rope: Cosine and sine tables, (S, R) float32, S the cache's capacity.
        tokens: (B, T) int32.
        positions: (B, T) int32, consecutive in each row and below the cache's capacity. A row may
            end in padding: tokens at the positions that follow, whose results mean nothing and
            whose cache entries nobody sees before they are written again.
        cache: one per layer, holding the positions before these.
    Returns:
        The last hidden states, (B, T, E), and the cache with the new positions.
    """
    x = ops.embedding(tokens, params["embed_tokens"])
    rope = rope_at(ops, rope, positions)
    new_cache = []
    for layer, layer_cache in zip(params["layers"], cache, strict=True):
        x, layer_cache = decoder_layer(ops, config, layer, x, positions, rope, layer_cache)
        new_cache.append(layer_cache)
    return ops.rms_norm(x, params["norm"], config.rms_norm_eps), new_cache


def logits(ops: Backend, params: Params, hidden: Array) -> Array:
    """Scores of the next token: (..., E) gives (..., V) float32."""
    return ops.linear(hidden, params.get("lm_head", params["embed_tokens"]))


def rope_at(ops: Backend, rope: tuple[Array, Array], positions: Array) -> tuple[Array, Array]:
    """Rows of the cosine and sine tables: (B, T) gives two of (B, T, R)."""
    xp = ops.xp

    def rows(table: Array) -> Array:
        picked = xp.take(table, xp.reshape(positions, (-1,)), axis=0)
        return xp.reshape(picked, (*positions.shape, table.shape[1]))

    return rows(rope[0]), rows(rope[1])


def decoder_layer(
    ops: Backend,
    config: Phi3Config,
    layer: Params,
    x: Array,
    positions: Array,
    rope: tuple[Array, Array],
    cache: LayerCache,
) -> tuple[Array, LayerCache]:
    """x + attention(norm(x)), then x + mlp(norm(x)); x is (B, T, E)."""
    h = ops.rms_norm(x, layer["input_layernorm"], config.rms_norm_eps)
    h, cache = attention(ops, config, layer, h, positions, rope, cache)
    x = x + h
    h = ops.rms_norm(x, layer["post_attention_layernorm"], config.rms_norm_eps)
    return x + mlp(ops, layer, h), cache


def attention(
    ops: Backend,
    config: Phi3Config,
    layer: Params,
    x: Array,
    positions: Array,
    rope: tuple[Array, Array],
    cache: LayerCache,
) -> tuple[Array, LayerCache]:
    """Grouped-query self-attention with rotary positions, causal, optionally in a window."""
    xp = ops.xp
    b, t, _ = x.shape
    h, k, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    qkv = ops.linear(x, layer["qkv_proj"])
    if "qkv_bias" in layer:
        qkv = qkv + xp.broadcast_to(layer["qkv_bias"], qkv.shape)
    qkv = xp.reshape(qkv, (b, t, h + 2 * k, d))
    rotated = ops.rope(qkv[:, :, : h + k, :], *rope)
    query = xp.permute_dims(rotated[:, :, :h, :], (0, 2, 1, 3))  # (B, H, T, D)
    key = xp.permute_dims(rotated[:, :, h:, :], (0, 2, 1, 3))  # (B, K, T, D)
    value = xp.permute_dims(qkv[:, :, h + k :, :], (0, 2, 1, 3))  # (B, K, T, D)

    cache = ops.update_cache(cache, key, value, positions)
    out = ops.attention(query, cache, positions, d**-0.5, config.sliding_window)
    out = xp.reshape(xp.permute_dims(out, (0, 2, 1, 3)), (b, t, h * d))
    return ops.linear(out, layer["o_proj"]), cache


def mlp(ops: Backend, layer: Params, x: Array) -> Array:
    """down(silu(gate(x)) * up(x)), gate and up in one matrix."""
    return ops.linear(ops.swiglu(ops.linear(x, layer["gate_up_proj"])), layer["down_proj"])
