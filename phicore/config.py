"""The hyperparameters of a model, read from GGUF metadata and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phicore.errors import GGUFError

ARCHITECTURES = ("phi3", "phimoe", "llama", "qwen2")
PHI = ("phi3", "phimoe")
"""Those with Phi-3's vocabulary and LongRoPE."""
NUM_EXPERTS_PER_TOK = 2  # of `phimoe`: its routing is made for two

# Name here (as in the reference's configuration): GGUF key after the architecture's name.
KEYS = {
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
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
# Keys that change nothing here, or that must have the value given to change nothing.
HARMLESS = {
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "attention.value_length",  # checked against the key length
}
NEUTRAL = {
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scale_linear": 1.0,
    "expert_count": 0,  # but of `phimoe`
    "expert_used_count": 0,
    "attention.causal": True,
}


@dataclass(frozen=True)
class Phi3Config:
    """Sizes and constants of the network. Names are those of transformers' `Phi3Config`."""

    architecture: str
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
    """A token sees this many positions, itself included; None: all before it."""
    original_max_position_embeddings: int | None = None
    """LongRoPE: the context before it was extended; sequences up to it rotate by other factors."""
    num_local_experts: int = 0
    """How many matrices there are in place of each in `mlp`; 0: one, and no router."""
    attention_factor: float | None = None
    """LongRoPE: what sines and cosines are multiplied by; None: see `rope.attention_factor`."""

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Phi3Config:
        """Read and check the hyperparameters.

        Raises:
            GGUFError: For an unknown architecture, a missing, malformed or inconsistent key, and
                for a key that is not understood: it might change the computation.
        """
        arch = metadata.get("general.architecture")
        if arch is None:
            raise GGUFError("general.architecture: missing; is this a model file?")
        if not isinstance(arch, str) or arch not in ARCHITECTURES:
            raise GGUFError(
                f"general.architecture: {_short(arch)} is not supported (supported: "
                f"{', '.join(ARCHITECTURES)})"
            )
        _refuse_unknown(arch, metadata)
        read = _Reader(arch, metadata)
        heads = read.integer("num_attention_heads")
        hidden_size = read.integer("hidden_size")
        if hidden_size % heads and f"{arch}.{KEYS['head_dim']}" not in metadata:
            raise GGUFError(
                f"{arch}.embedding_length: {hidden_size} is not a multiple of "
                f"{arch}.attention.head_count {heads}"
            )
        head_dim = read.integer("head_dim", hidden_size // heads)
        kv_heads = read.integer("num_key_value_heads", heads)
        layers = read.integer("num_hidden_layers")
        context = read.integer("max_position_embeddings")
        window = read.integer(
            "sliding_window", _default_window(arch, layers, kv_heads, context), minimum=0
        )
        config = cls(
            architecture=arch,
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=read.number("rms_norm_eps"),
            rope_theta=read.number("rope_theta", 10000.0),
            rotary_dim=read.integer("rotary_dim", head_dim),
            sliding_window=window if 0 < window < context else None,
            original_max_position_embeddings=read.optional("original_max_position_embeddings", int),
            attention_factor=read.optional("attention_factor", float),
            num_local_experts=read.integer("num_local_experts") if arch == "phimoe" else 0,
        )
        config._check(metadata)
        return config

    def _check(self, metadata: Mapping[str, Any]) -> None:
        arch = self.architecture
        chosen = metadata.get(f"{arch}.{KEYS['num_experts_per_tok']}")
        count, expected = self.num_local_experts, NUM_EXPERTS_PER_TOK
        if count and (chosen != expected or count < expected):
            raise GGUFError(
                f"{arch}.expert_used_count: expected {expected} of {expected} or more experts "
                f"({arch}.expert_count), found {_short(chosen)} of {count}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise GGUFError(
                f"{arch}.attention.head_count: {self.num_attention_heads} is not a multiple of "
                f"{arch}.attention.head_count_kv {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise GGUFError(
                f"{arch}.rope.dimension_count: expected an even number up to the head size "
                f"{self.head_dim}, found {self.rotary_dim}"
            )
        if arch not in PHI and self.rotary_dim != self.head_dim:
            raise GGUFError(
                f"{arch}.rope.dimension_count: {self.rotary_dim} of {self.head_dim} channels: "
                "partial rotation is not supported for this architecture"
            )
        value_length = metadata.get(f"{arch}.attention.value_length", self.head_dim)
        if not isinstance(value_length, int) or value_length != self.head_dim:
            raise GGUFError(
                f"{arch}.attention.value_length: expected the key length {self.head_dim}, "
                f"found {_short(value_length)}"
            )


@dataclass(frozen=True)
class _Reader:
    """Typed access to the architecture's keys."""

    arch: str
    metadata: Mapping[str, Any]

    def _get(self, name: str, default: Any) -> tuple[str, Any]:
        key = f"{self.arch}.{KEYS[name]}"
        value = self.metadata.get(key, default)
        if value is None:
            raise GGUFError(f"{key}: missing; the file is incomplete or was made for another use")
        return key, value

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        key, value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise GGUFError(f"{key}: expected an integer, found {_short(value)}")
        if not minimum <= value < 2**31:
            raise GGUFError(f"{key}: expected {minimum} to {2**31 - 1}, found {value}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        key, value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise GGUFError(f"{key}: expected a number, found {_short(value)}")
        if not 0 < value < float("inf"):  # false for NaN too
            raise GGUFError(f"{key}: expected a positive number, found {value}")
        return float(value)

    def optional(self, name: str, kind: type) -> Any:
        """A number that may be absent: None then."""
        if f"{self.arch}.{KEYS[name]}" not in self.metadata:
            return None
        return self.integer(name) if kind is int else self.number(name)


def _refuse_unknown(arch: str, metadata: Mapping[str, Any]) -> None:
    """A key that is not understood might change the computation: better no text than wrong text."""
    known = set(KEYS.values()) | HARMLESS
    if arch != "phimoe":
        known -= NEUTRAL.keys()
    for key, value in metadata.items():
        name = key.removeprefix(f"{arch}.")
        if name == key or name in known:
            continue
        if name not in NEUTRAL:
            raise GGUFError(f"{key}: this hyperparameter is not supported")
        if arch in PHI and name == "rope.scaling.type" and value == "longrope":
            continue  # what the factors in the file say anyway
        if not isinstance(value, (str, int, float)) or value != NEUTRAL[name]:
            raise GGUFError(f"{key}: {_short(value)} is not supported (supported: {NEUTRAL[name]})")


def _default_window(arch: str, layers: int, kv_heads: int, context: int) -> int:
    """The window of files from before `attention.sliding_window` was written.

    Source: llama.cpp, `llama_model::load_hparams`, case LLM_ARCH_PHI3.
    """
    if arch != "phi3":
        return 0
    if layers in (32, 40) and context == 4096:
        return 2047
    if layers == 32 and kv_heads == 32 and context == 131072:
        return 262144
    if layers == 40 and kv_heads == 10 and context == 131072:
        return 131072
    return 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
