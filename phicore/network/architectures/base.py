"""The base class of architectures, which map a file's keys and tensors to those of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from typing import Any

import numpy as np

from phicore.backend import Params
from phicore.errors import GGUFError
from phicore.gguf.matrix import Split
from phicore.gguf.reader import GGUFFile, GGUFTensor
from phicore.network.architectures.hyperparameters import Hyperparameters, listed, short
from phicore.network.architectures.keys import (
    HARMLESS,
    NEUTRAL,
    READ,
    REPEATED,
    why_refused,
)
from phicore.network.config import Phi3Config
from phicore.network.rope import RopeFactors
from phicore.network.tensors import Tensors
from phicore.values import as_kind

# Bounds of rotary factors. The factors of trained models are 1 to 70.
FACTORS_RANGE = (1e-6, 1e6)


class Architecture:
    """The family of files with one value of `general.architecture`.

    To add an architecture, write a subclass with a name that overrides what differs from the most
    common layout. This class implements that layout: separate matrices for queries, keys, values,
    gate and up, no biases, and rotation of the channels i and i + D/2 of a head together.
    Architectures do not compute with weights. They only move whole rows, so that weights stay
    quantized.
    """

    name: str
    """The value of `general.architecture`."""
    keys: Mapping[str, str] = READ
    """The hyperparameters that are read: names of `Phi3Config` to GGUF keys."""
    repeated: Mapping[str, str] = REPEATED
    """Keys that repeat a field of `Phi3Config`."""
    harmless: frozenset[str] = HARMLESS
    """Keys that do not change the computation. Any other key that is not read is an error, since it
    might change the computation, and no text is better than wrong text."""
    neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL
    """Keys that do not change the computation if they have one of the given values."""
    rotates_partly: bool = False
    """Whether `rope.dimension_count` may be less than the head size."""
    scales_linearly: bool = True
    """Whether `rope.scaling.factor` may divide positions."""
    may_tie_embeddings: bool = True
    """Whether a file may leave out `output.weight`. The embedding is then the output matrix too."""
    rope_tensors: tuple[str, ...] = ("rope_freqs.weight",)
    """The tensors of rotary factors, which divide the frequencies, if a file has them."""

    # ---- hyperparameters -------------------------------------------------------------------

    def config(self, metadata: Mapping[str, Any]) -> Phi3Config:
        """Read and check the hyperparameters.

        Raises:
            GGUFError: If a key is missing, malformed, inconsistent or unknown.
        """
        self._refuse_unknown(metadata)
        read = Hyperparameters(self.name, self.keys, metadata)
        heads = read.integer("num_attention_heads")
        hidden_size = read.integer("hidden_size")
        if hidden_size % heads and "head_dim" not in read:
            raise GGUFError(
                f"{read.key('hidden_size')}: {hidden_size} is not a multiple of "
                f"{read.key('num_attention_heads')} {heads}"
            )
        head_dim = read.integer("head_dim", hidden_size // heads)
        kv_heads = read.integer("num_key_value_heads", heads)
        context = read.integer("max_position_embeddings")
        window = read.integer("sliding_window", self.default_window(read), minimum=0)
        config = Phi3Config(
            architecture=self.name,
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size"),
            num_hidden_layers=read.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=read.number("rms_norm_eps", maximum=1),
            rope_theta=read.number("rope_theta", 10000.0, minimum=1),
            rotary_dim=read.integer("rotary_dim", head_dim),
            sliding_window=window if 0 < window < context else None,
            # 0 is how ollama's converter says that there is none.
            original_max_position_embeddings=(
                read.integer("original_max_position_embeddings", 0, minimum=0) or None
            ),
            attention_factor=(
                read.number("attention_factor", minimum=0.01, maximum=100)
                if "attention_factor" in read
                else None
            ),
            num_local_experts=self.experts(read),
            rope_scaling_factor=self.scaling_factor(read),
        )
        self._check(config, read)
        return config

    def default_window(self, read: Hyperparameters) -> int:
        """Return the sliding window for a file that has no such key; 0 means no window."""
        return 0

    def scaling_factor(self, read: Hyperparameters) -> float:
        """Return the factor of linear scaling, 1 if there is none.

        0 means that there is none, and a factor without a type means linear scaling, as in
        llama.cpp.
        """
        names = ("rope_scaling_factor", "rope_scale_linear")
        found = {name: factor for name in names if (factor := read.number(name, 0.0, minimum=0))}
        name, factor = next(iter(found.items()), (names[0], 1.0))
        where = f"{read.key(name)}: {factor:g}"
        if any(other != factor for other in found.values()):
            other = names[1]
            raise GGUFError(f"{where} contradicts {read.key(other)} {found[other]:g}")
        if factor == 1:
            return factor
        key = f"{self.name}.rope.scaling.type"
        kind = as_kind(read.metadata.get(key, ""), str) or "linear"
        if kind == "none":
            raise GGUFError(f"{where} contradicts {key} 'none'")
        if kind != "linear":
            raise GGUFError(
                f"{read.key(name)}: a scaling of {factor:g} of the type {kind!r} is not supported "
                "(supported: linear)"
            )
        if not self.scales_linearly:
            raise GGUFError(
                f"{read.key(name)}: a scaling of {factor:g} is not supported for this architecture"
            )
        least, most = FACTORS_RANGE
        if not least <= factor <= most:
            raise GGUFError(f"{where}: expected {least:g} to {most:g}")
        return factor

    def experts(self, read: Hyperparameters) -> int:
        """Return the number of experts in a layer; 0 means that a layer has one `mlp`."""
        return 0

    def _refuse_unknown(self, metadata: Mapping[str, Any]) -> None:
        known = {*self.keys.values(), *self.repeated, *self.harmless}
        for key, value in metadata.items():
            name = key.removeprefix(f"{self.name}.")
            if name == key or name in known:
                continue
            allowed = self.neutral.get(name)
            if allowed is None:
                raise GGUFError(f"{key}: {why_refused(name)}")
            if any(each not in allowed for each in listed(value)):
                raise GGUFError(
                    f"{key}: {short(value)} is not supported (supported: "
                    f"{' or '.join(map(str, allowed))})"
                )

    def _check_repeated(self, config: Phi3Config, read: Hyperparameters) -> None:
        """Refuse keys that contradict the configuration, and name both."""
        for name, field in self.repeated.items():
            key = f"{self.name}.{name}"
            expected = getattr(config, field)
            for value in listed(read.metadata.get(key)):
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not is_number or (value and not isclose(value, expected, rel_tol=1e-6)):
                    is_read = field in self.keys and field in read
                    source = read.key(field) if is_read else f"the {field.replace('_', ' ')}"
                    raise GGUFError(f"{key}: {short(value)} contradicts {source} {expected}")

    def _check(self, config: Phi3Config, read: Hyperparameters) -> None:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if heads % kv_heads:
            raise GGUFError(
                f"{read.key('num_attention_heads')}: {heads} is not a multiple of "
                f"{read.key('num_key_value_heads')} {kv_heads}"
            )
        rotary_dim, head_dim = config.rotary_dim, config.head_dim
        if rotary_dim % 2 or rotary_dim > head_dim:
            raise GGUFError(
                f"{read.key('rotary_dim')}: expected an even number up to the head size "
                f"{head_dim}, found {rotary_dim}"
            )
        if rotary_dim != head_dim and not self.rotates_partly:
            raise GGUFError(
                f"{read.key('rotary_dim')}: {rotary_dim} of {head_dim} channels: "
                "partial rotation is not supported for this architecture"
            )
        self._check_repeated(config, read)

    # ---- rotation --------------------------------------------------------------------------

    def rope_factors(self, config: Phi3Config, file: GGUFFile) -> RopeFactors | None:
        """Read the divisors of the rotary frequencies; return None if the file has none.

        Raises:
            GGUFError: If the factors are misshapen or out of range, or if the hyperparameters need
                factors that the file does not have.
        """
        if config.attention_factor not in (None, 1):
            raise GGUFError(
                f"{file.path.name}: {self.name}.rope.scaling.attn_factor: "
                f"{config.attention_factor} is not supported (supported: 1)"
            )
        found = self.rope_tensors_of(file)
        scaling = config.rope_scaling_factor
        if scaling != 1:
            if found:
                raise GGUFError(
                    f"{file.path.name}: {self.name}.rope.scaling.factor: {scaling:g} together with "
                    f"the tensor {found[0]!r} is not supported"
                )
            same = np.full(config.rotary_dim // 2, scaling, np.float32)
            return RopeFactors(same, same)
        if not found:
            return None
        (factors,) = (self.factors(name, config, file) for name in found)
        return RopeFactors(factors, factors)

    def rope_tensors_of(self, file: GGUFFile) -> list[str]:
        """Return the names of the rotary factors that a file has. Empty tensors count as none."""
        found = (name for name in self.rope_tensors if name in file.tensors)
        return [name for name in found if file.tensors[name].n_elements]

    @staticmethod
    def factors(name: str, config: Phi3Config, file: GGUFFile) -> np.ndarray:
        """Read a tensor of rotary factors: (R,) float32.

        The bounds of the factors and of `rope.freq_base` keep all frequencies within float32.

        Raises:
            GGUFError: If the tensor is missing or misshapen, or has a factor out of range.
        """
        where = f"{file.path.name}: tensor {name!r}"
        if name not in file.tensors:
            raise GGUFError(f"{where} is missing")
        shape = (config.rotary_dim // 2,)
        if file.tensors[name].shape != shape:
            raise GGUFError(
                f"{where}: expected shape {list(shape)} by the hyperparameters, "
                f"found {list(file.tensors[name].shape)}"
            )
        values = file.tensors[name].dequantize()
        least, most = FACTORS_RANGE
        is_wrong = ~((values >= least) & (values <= most))  # true for NaN too
        if is_wrong.any():
            raise GGUFError(
                f"{where}: expected numbers from {least:g} to {most:g}, "
                f"found {values[is_wrong][0]:g}"
            )
        return values

    # ---- tensors ---------------------------------------------------------------------------

    def params(self, config: Phi3Config, tensors: Tensors) -> Params:
        """Load the parameters of the graph from a file's tensors.

        Returns:
            `embed_tokens`, `lm_head` (absent if it is tied to the embedding), `norm`, `layers` (a
            list with one dictionary for each layer), and biases if the architecture has some.
        Raises:
            GGUFError: If a tensor is missing or misshapen, or has a type that cannot be read.
        """
        e, v = config.hidden_size, config.vocab_size
        params: dict[str, Any] = {
            "embed_tokens": tensors.matrix("token_embd.weight", v, e),
            "layers": [
                self.layer(config, tensors, f"blk.{n}") for n in range(config.num_hidden_layers)
            ],
            "norm": tensors.vector({"output_norm.weight": e}),
        }
        if "output.weight" in tensors or not self.may_tie_embeddings:
            split = Split((v,), is_gathered=True)
            params["lm_head"] = tensors.matrix("output.weight", v, e, split)
        return params

    def layer(self, config: Phi3Config, tensors: Tensors, blk: str) -> dict[str, Any]:
        """Load one layer, whose tensors have names that begin with `blk`."""
        e = config.hidden_size
        return {
            "input_layernorm": tensors.vector({f"{blk}.attn_norm.weight": e}),
            **self.attention(config, tensors, blk),
            "post_attention_layernorm": tensors.vector({f"{blk}.ffn_norm.weight": e}),
            **self.mlp(config, tensors, blk),
        }

    def attention(self, config: Phi3Config, tensors: Tensors, blk: str) -> dict[str, Any]:
        """Load `qkv_proj` and `o_proj`, and their biases if the architecture has some."""
        q_size = config.num_attention_heads * config.head_dim
        return {
            "qkv_proj": tensors.load(
                "qkv_proj",
                *self.qkv(config, tensors, blk),
                split=Split(tuple(qkv_rows(config).values())),
            ),
            "o_proj": tensors.matrix(
                f"{blk}.attn_output.weight", config.hidden_size, q_size, Split()
            ),
        }

    def qkv(self, config: Phi3Config, tensors: Tensors, blk: str) -> list[GGUFTensor]:
        """Take the tensors of `qkv_proj`: the rows of queries, then keys, then values."""
        return [
            tensors.take(f"{blk}.attn_{part}.weight", rows, config.hidden_size)
            for part, rows in qkv_rows(config).items()
        ]

    def mlp(self, config: Phi3Config, tensors: Tensors, blk: str) -> dict[str, Any]:
        """Load `gate_up_proj` and `down_proj`, or a router and experts."""
        e, f = config.hidden_size, config.intermediate_size
        return {
            "gate_up_proj": tensors.load(
                "gate_up_proj", *self.gate_up(config, tensors, blk), split=Split((f, f))
            ),
            "down_proj": tensors.matrix(f"{blk}.ffn_down.weight", e, f, Split()),
        }

    def gate_up(self, config: Phi3Config, tensors: Tensors, blk: str) -> list[GGUFTensor]:
        """Take the tensors of `gate_up_proj`: the rows of gate, then up."""
        e, f = config.hidden_size, config.intermediate_size
        return [tensors.take(f"{blk}.ffn_{part}.weight", f, e) for part in ("gate", "up")]


def qkv_rows(config: Phi3Config) -> dict[str, int]:
    """Return the numbers of rows of the queries ("q"), keys ("k") and values ("v")."""
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return {"q": q, "k": kv, "v": kv}
