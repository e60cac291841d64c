"""From a GGUF file's tensors to the parameters of the graph.

`phi3` files hold the graph's fused matrices. Others hold the same network with separate matrices,
`llama` files with the rows of queries and keys in the order of interleaved rotation; here they are
stacked and put back in order, which moves whole quantized rows and changes no value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from phicore.config import PHI, Phi3Config
from phicore.errors import GGUFError
from phicore.gguf.matrix import Matrix
from phicore.gguf.reader import GGUFFile, GGUFTensor
from phicore.protocol import Backend, Params
from phicore.rope import RopeFactors, attention_factor

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

# What rotary frequencies are divided by, for short and for long sequences, by architecture.
ROPE_FACTORS = {
    "phi3": ("rope_factors_short.weight", "rope_factors_long.weight"),
    "phimoe": ("rope_factors_short.weight", "rope_factors_long.weight"),
    "llama": ("rope_freqs.weight", "rope_freqs.weight"),
    "qwen2": (),
}

# Tensors that carry nothing for this graph: the tables that old converters wrote of the rotation.
IGNORED = (".attn_rot_embd.weight", ".attn.rot_embd", ".rope.freqs")


def load_params(ops: Backend, config: Phi3Config, file: GGUFFile, progress: Progress) -> Params:
    """Load every tensor of the file.

    Returns:
        `embed_tokens`, `lm_head` (absent when it is tied to the embedding), `norm`, and `layers`, a
        list with one dictionary a layer; and the biases that models of this architecture have.
    Raises:
        GGUFError: For a missing, surplus or misshapen tensor, or a type that cannot be read.
    """
    arch = config.architecture
    reader = _Tensors(ops, file, progress, used=ROPE_FACTORS[arch])
    h, k, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    e, f = config.hidden_size, config.intermediate_size

    def layer(n: int) -> dict[str, Any]:
        blk = f"blk.{n}"
        if arch == "phi3":
            qkv = [reader.take(f"{blk}.attn_qkv.weight", (h + 2 * k) * d, e)]
        else:
            qkv = [
                reader.take(f"{blk}.attn_q.weight", h * d, e),
                reader.take(f"{blk}.attn_k.weight", k * d, e),
                reader.take(f"{blk}.attn_v.weight", k * d, e),
            ]
            if arch == "llama":
                qkv[0] = rows_for_half_rotation(qkv[0], h)
                qkv[1] = rows_for_half_rotation(qkv[1], k)
        found = {
            "input_layernorm": reader.vector({f"{blk}.attn_norm.weight": e}),
            "qkv_proj": reader.load("qkv_proj", *qkv),
            "o_proj": reader.matrix(f"{blk}.attn_output.weight", e, h * d),
            "post_attention_layernorm": reader.vector({f"{blk}.ffn_norm.weight": e}),
        }
        if arch in ("qwen2", "phimoe"):
            sizes = {"q": h * d, "k": k * d, "v": k * d}
            names = {f"{blk}.attn_{part}.bias": size for part, size in sizes.items()}
            found["qkv_proj_bias"] = reader.vector(names)
        if arch == "phimoe":
            found["o_proj_bias"] = reader.vector({f"{blk}.attn_output.bias": e})
            found["input_layernorm_bias"] = reader.vector({f"{blk}.attn_norm.bias": e})
            found["post_attention_layernorm_bias"] = reader.vector({f"{blk}.ffn_norm.bias": e})
        return found | (experts(blk) if config.num_local_experts else mlp(blk))

    def mlp(blk: str) -> dict[str, Any]:
        if arch == "phi3":
            gate_up = [reader.take(f"{blk}.ffn_up.weight", 2 * f, e)]
        else:
            gate_up = [
                reader.take(f"{blk}.ffn_gate.weight", f, e),
                reader.take(f"{blk}.ffn_up.weight", f, e),
            ]
        return {
            "gate_up_proj": reader.load("gate_up_proj", *gate_up),
            "down_proj": reader.matrix(f"{blk}.ffn_down.weight", e, f),
        }

    def experts(blk: str) -> dict[str, Any]:
        count = config.num_local_experts
        gate_up = [
            reader.take(f"{blk}.ffn_gate_exps.weight", count, f, e),
            reader.take(f"{blk}.ffn_up_exps.weight", count, f, e),
        ]
        down = reader.take(f"{blk}.ffn_down_exps.weight", count, e, f)
        return {
            "router": reader.matrix(f"{blk}.ffn_gate_inp.weight", count, e),
            "experts_gate_up_proj": reader.load_experts("experts_gate_up_proj", *gate_up),
            "experts_down_proj": reader.load_experts("experts_down_proj", down),
        }

    params: dict[str, Any] = {
        "embed_tokens": reader.matrix("token_embd.weight", vocab_size(file), e),
        "layers": [layer(n) for n in range(config.num_hidden_layers)],
        "norm": reader.vector({"output_norm.weight": e}),
    }
    if "output.weight" in file.tensors or arch == "phimoe":
        params["lm_head"] = reader.matrix("output.weight", vocab_size(file), e)
    if arch == "phimoe":
        params["norm_bias"] = reader.vector({"output_norm.bias": e})
        params["lm_head_bias"] = reader.vector({"output.bias": vocab_size(file)})
    reader.check_all_read()
    return params


def load_rope_factors(config: Phi3Config, file: GGUFFile) -> RopeFactors | None:
    """What the file's rotary frequencies are divided by; None if it says nothing of it.

    Raises:
        GGUFError: If the factors are incomplete, misshapen or no positive numbers, or the
            hyperparameters ask for some that are not there.
    """
    names = ROPE_FACTORS[config.architecture]
    arch, scale = config.architecture, config.attention_factor
    if arch not in PHI and scale not in (None, 1):
        raise GGUFError(
            f"{file.path.name}: {arch}.rope.scaling.attn_factor: {scale} is not supported "
            "(supported: 1)"
        )
    found = {name: file.tensors[name] for name in names if name in file.tensors}
    where = file.path.name
    if not found:
        context = config.max_position_embeddings
        is_extended = arch in PHI and (config.original_max_position_embeddings or context) < context
        if is_extended or scale not in (None, 1):
            raise GGUFError(f"{where}: tensors {' and '.join(names)} are missing")
        return None
    factors = []
    for name in names:
        if name not in found:
            raise GGUFError(f"{where}: tensor {name!r} is missing")
        if found[name].shape != (config.rotary_dim // 2,):
            raise GGUFError(
                f"{where}: tensor {name!r}: expected shape [{config.rotary_dim // 2}] by the "
                f"hyperparameters, found {list(found[name].shape)}"
            )
        values = found[name].dequantize()
        if not (np.isfinite(values) & (values > 0)).all():
            raise GGUFError(f"{where}: tensor {name!r}: expected positive numbers")
        factors.append(values)
    if arch not in PHI:
        return RopeFactors(factors[0], factors[1])
    original = config.original_max_position_embeddings
    if original is None or original < 2:
        raise GGUFError(
            f"{where}: {arch}.rope.scaling.original_context_length: expected 2 or more with the "
            f"rope factors of this file, found {original or 'nothing'}"
        )
    return RopeFactors(factors[0], factors[1], attention_factor(config))


def vocab_size(file: GGUFFile) -> int:
    """How many tokens the embedding has."""
    tensor = file.tensors.get("token_embd.weight")
    if tensor is None:
        raise GGUFError(f"{file.path.name}: tensor 'token_embd.weight' is missing")
    return tensor.shape[0]


def rows_for_half_rotation(tensor: GGUFTensor, heads: int) -> GGUFTensor:
    """Undo the row order that interleaved rotation wants: channels i and i + D/2 apart again.

    Source: `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py, whose inverse this is.
    """
    rows = tensor.data.reshape(heads, -1, 2, tensor.data.shape[-1])  # (heads, D/2, 2, bytes)
    return replace(tensor, data=rows.swapaxes(1, 2).reshape(tensor.data.shape))


class _Tensors:
    """Takes tensors out of a file, checks their shapes and remembers which were taken."""

    def __init__(
        self, ops: Backend, file: GGUFFile, progress: Progress, used: tuple[str, ...]
    ) -> None:
        self._ops = ops
        self._file = file
        self._progress = progress
        self._left = {
            n: t for n, t in file.tensors.items() if n not in used and not n.endswith(IGNORED)
        }
        self._total_bytes = sum(t.size_bytes for t in self._left.values())
        self._done_bytes = 0

    def take(self, name: str, *shape: int) -> GGUFTensor:
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise GGUFError(f"{self._file.path.name}: tensor {name!r} is missing")
        if tensor.shape != shape:
            raise GGUFError(
                f"{self._file.path.name}: tensor {name!r}: expected shape {list(shape)} "
                f"by the hyperparameters, found {list(tensor.shape)}"
            )
        return tensor

    def load(self, name: str, *parts: GGUFTensor) -> Any:
        weight = self._ops.load_weight(Matrix(name, parts))
        self._count(*parts)
        return weight

    def load_experts(self, name: str, *parts: GGUFTensor) -> Any:
        """Tensors (X, N, K): the parts of a matrix for each expert."""

        def expert(number: int) -> Matrix:
            return Matrix(
                name,
                tuple(replace(p, shape=p.shape[1:], data=p.data[number]) for p in parts),
            )

        weight = self._ops.load_experts([expert(n) for n in range(parts[0].shape[0])])
        self._count(*parts)
        return weight

    def matrix(self, name: str, rows: int, columns: int) -> Any:
        return self.load(name, self.take(name, rows, columns))

    def vector(self, sizes: dict[str, int]) -> Any:
        """Vectors of these names and sizes, one after the other."""
        tensors = [self.take(name, size) for name, size in sizes.items()]
        self._count(*tensors)
        return self._ops.asarray(np.concatenate([tensor.dequantize() for tensor in tensors]))

    def _count(self, *tensors: GGUFTensor) -> None:
        for tensor in tensors:
            self._file.forget(tensor.name)
        self._done_bytes += sum(t.size_bytes for t in tensors)
        self._progress("loading", self._done_bytes, self._total_bytes)

    def check_all_read(self) -> None:
        if self._left:
            names = ", ".join(list(self._left)[:3])
            raise GGUFError(
                f"{self._file.path.name}: {len(self._left)} tensors that this version does not "
                f"use, which would give wrong text: {names}"
            )
