"""The hyperparameters of a model. An architecture reads them from a file's metadata."""

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
    """How many channels of a head are rotated; the rest passes through."""
    sliding_window: int | None
    """A token sees this many positions, itself included; None is all before it."""
    original_max_position_embeddings: int | None = None
    """LongRoPE: the context before it was extended. Longer sequences rotate by other factors."""
    vocab_size: int = 0
    """How many tokens the embedding has; 0 where only the metadata of a file was read."""
    num_local_experts: int = 0
    """How many experts a layer has in place of one `mlp`; 0 is none, and no router."""
    attention_factor: float | None = None
    """LongRoPE: what sines and cosines are multiplied by; None is the factor of the paper."""

    def share(self, devices: int) -> Phi3Config:
        """The configuration of the part that one of several devices computes.

        It has a share of the heads and of the channels of `mlp`.

        Raises:
            BackendError: If the number of devices does not divide them.
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
