"""The hyperparameters of a model, which an architecture reads from a file's metadata."""

from __future__ import annotations

from dataclasses import dataclass, replace

from phicore.errors import BackendError


@dataclass(frozen=True)
class Phi3Config:
    """Sizes and constants of the network. Names are those of transformers' `Phi3Config`."""

    architecture: str
    """The file's `general.architecture`; the network does not depend on it."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    """Number of channels of a head that are rotated; the other channels stay unchanged."""
    sliding_window: int | None
    """Number of positions that a token sees, itself included. None means all earlier positions."""
    original_max_position_embeddings: int | None = None
    """LongRoPE: the context before it was extended. Longer sequences use the long factors."""
    vocab_size: int = 0
    """Number of tokens that the embedding has; 0 if only the metadata of a file was read."""
    num_local_experts: int = 0
    """Number of experts in a layer. 0 means that a layer has one `mlp` and no router."""
    rope_scaling_factor: float = 1.0
    """Linear scaling of the rotation: positions are divided by this factor."""
    attention_factor: float | None = None
    """LongRoPE: the factor for sines and cosines. None means the factor of the paper's formula."""

    @property
    def attention_scale(self) -> float:
        """Return the factor of attention scores: one over the square root of the head size."""
        return self.head_dim**-0.5

    def share(self, devices: int) -> Phi3Config:
        """Return the configuration of the part of the network that one of `devices` computes.

        Each device has a share of the heads and of the channels of `mlp`.

        Raises:
            BackendError: If the number of devices does not divide the heads or the channels.
        """
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if kv_heads % devices or self.intermediate_size % devices:
            raise BackendError(
                f"devices: {devices} cannot share {kv_heads} heads of keys and "
                f"{self.intermediate_size} channels of the feed-forward layers; take fewer"
            )
        return replace(
            self,
            num_attention_heads=heads // devices,
            num_key_value_heads=kv_heads // devices,
            intermediate_size=self.intermediate_size // devices,
        )
