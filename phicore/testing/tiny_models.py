"""Tiny random models as GGUF files, of every ggml type, whose bytes follow from a seed.

The tests write the files that they read. A file has the names, keys, row orders and block layouts
of llama.cpp's conversion of a checkpoint, and random weights of a realistic scale. By default it
also has a small SentencePiece-style vocabulary.

A file is the same on every machine and NumPy version (see `phicore.gguf.random_models`). The
reference logits in `golden/` belong to exactly these bytes.
"""

import math
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeAlias

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from phicore.gguf.random_models import (
    TYPES,
    Sizes,
    add_sizes,
    add_vocabulary,
    normal,
    random_matrix,
)

Types: TypeAlias = Mapping[str, Type] | Type

Q4_K_M: Mapping[str, Type] = {
    "output.weight": Type.Q6_K,
    "*.attn_qkv.weight": Type.Q5_K,
    "*.attn_v.weight": Type.Q6_K,
    "*.ffn_down.weight": Type.Q6_K,
    "*.ffn_down_exps.weight": Type.Q6_K,
    "*": Type.Q4_K,
}
"""The mix of types that llama.cpp calls Q4_K_M. In a `llama` file, v differs from q and k."""


@dataclass(frozen=True)
class Tiny(Sizes):
    """The hyperparameters of a tiny model.

    By default, all axes have different sizes, also those of fused matrices. `hidden_size` and
    `intermediate_size` are multiples of 256, since the length of a row of K-quants must be.
    """

    hidden_size: int = 512
    intermediate_size: int = 768
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    vocab_size: int = 352
    max_position_embeddings: int = 500
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    rope_dimension_count: int | None = None  # None means head_dim
    original_max_position_embeddings: int | None = None  # a number means rotation with factors
    rope_scaling_factor: float | None = None  # a number means linear scaling
    arch: str = "phi3"  # or "phimoe", "llama", "qwen2"
    num_local_experts: int = 0  # only for "phimoe"

    @property
    def rotary_dim(self) -> int:
        return self.rope_dimension_count or self.head_dim


def write_model(
    path: str | Path, tiny: Tiny, types: Types, *, seed: int = 0, tokenizer: bool = True
) -> Path:
    """Write a model to a GGUF file and return its path.

    With the same seed, and one type for all tensors, files of the architectures `phi3` and `llama`
    hold the same network.

    Args:
        path: The file to write.
        tiny: The hyperparameters.
        types: The type of all matrices, or types by shell-style patterns of tensor names, of which
            the first that matches counts. Norms are float32.
        seed: The seed of the weights.
        tokenizer: Whether to write a vocabulary, for which `tiny.vocab_size` must have room.
    """
    writer = gguf.GGUFWriter(path, tiny.arch)
    _add_config(writer, tiny, types)
    if tokenizer:
        words = [*_MERGES.split(), *_CHARACTERS]
        add_vocabulary(writer, words, tiny.vocab_size, CHAT_TEMPLATE)
    rng = np.random.Generator(np.random.PCG64(seed))
    for name, data, data_type in _tensors(tiny, types, rng):
        writer.add_tensor(name, data, raw_dtype=data_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _tensors(
    tiny: Tiny, types: Types, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray, Type]]:
    """Yield the name, the data and the type of every tensor of a file."""

    def norm(name: str) -> Iterator[tuple[str, np.ndarray, Type]]:
        yield f"{name}.weight", 1 + np.float32(0.1) * normal(rng, tiny.hidden_size), Type.F32
        if is_moe:
            yield bias(name, tiny.hidden_size)

    def bias(name: str, size: int) -> tuple[str, np.ndarray, Type]:
        return f"{name}.bias", np.float32(0.5) * normal(rng, size), Type.F32

    def experts(name: str, rows: int, cols: int) -> tuple[str, np.ndarray, Type]:
        count = tiny.num_local_experts
        name, data, data_type = matrix(name, (count * rows,), cols, 1 / math.sqrt(cols))
        return name, data.reshape(count, rows, -1), data_type

    def matrix(
        name: str, rows: tuple[int, ...], cols: int, std: float, heads: int = 0
    ) -> tuple[str, np.ndarray, Type]:
        """Join random parts with these numbers of rows.

        If `heads` is not 0, the rows are put in the order for interleaved rotation.
        """
        data_type = _type_of(name, types)
        data = np.concatenate([random_matrix(data_type, n, cols, rng, std) for n in rows])
        return name, _interleave(data, heads) if heads else data, data_type

    hidden, intermediate = tiny.hidden_size, tiny.intermediate_size
    heads, kv_heads = tiny.num_attention_heads, tiny.num_key_value_heads
    q, kv = heads * tiny.head_dim, kv_heads * tiny.head_dim
    std = 1 / math.sqrt(hidden)  # so that the products of a matrix are as large as its input
    is_moe = tiny.arch == "phimoe"

    yield matrix("token_embd.weight", (tiny.vocab_size,), hidden, 0.05)
    for i in range(tiny.num_hidden_layers):
        blk = f"blk.{i}"
        yield from norm(f"{blk}.attn_norm")
        if tiny.arch == "phi3":
            yield matrix(f"{blk}.attn_qkv.weight", (q, kv, kv), hidden, std)
        else:
            is_llama = tiny.arch == "llama"  # other architectures do not interleave rows
            yield matrix(f"{blk}.attn_q.weight", (q,), hidden, std, heads if is_llama else 0)
            yield matrix(f"{blk}.attn_k.weight", (kv,), hidden, std, kv_heads if is_llama else 0)
            yield matrix(f"{blk}.attn_v.weight", (kv,), hidden, std)
        if tiny.arch == "qwen2" or is_moe:
            for part, size in (("q", q), ("k", kv), ("v", kv)):
                yield bias(f"{blk}.attn_{part}", size)
        yield matrix(f"{blk}.attn_output.weight", (hidden,), q, std)
        if is_moe:
            yield bias(f"{blk}.attn_output", hidden)
        yield from norm(f"{blk}.ffn_norm")
        if is_moe:
            count = tiny.num_local_experts
            yield f"{blk}.ffn_gate_inp.weight", std * normal(rng, count, hidden), Type.F32
            yield experts(f"{blk}.ffn_gate_exps.weight", intermediate, hidden)
            yield experts(f"{blk}.ffn_up_exps.weight", intermediate, hidden)
            yield experts(f"{blk}.ffn_down_exps.weight", hidden, intermediate)
            continue
        if tiny.arch == "phi3":
            yield matrix(f"{blk}.ffn_up.weight", (intermediate, intermediate), hidden, std)
        else:
            yield matrix(f"{blk}.ffn_gate.weight", (intermediate,), hidden, std)
            yield matrix(f"{blk}.ffn_up.weight", (intermediate,), hidden, std)
        yield matrix(f"{blk}.ffn_down.weight", (hidden,), intermediate, 1 / math.sqrt(intermediate))
    if tiny.original_max_position_embeddings and tiny.arch == "llama":
        yield "rope_freqs.weight", _llama3_factors(tiny), Type.F32
    elif tiny.original_max_position_embeddings:
        # Factors start near 1 and grow with the wavelength, as in trained models.
        steps = np.arange(1, tiny.rotary_dim // 2 + 1, dtype=np.float32)
        yield "rope_factors_long.weight", 1 + steps / 8, Type.F32
        yield "rope_factors_short.weight", 1 + steps / 64, Type.F32
    yield from norm("output_norm")
    if not tiny.tie_word_embeddings:
        yield matrix("output.weight", (tiny.vocab_size,), hidden, 2 * std)
    if is_moe:
        yield bias("output", tiny.vocab_size)


def _llama3_factors(tiny: Tiny) -> np.ndarray:
    """Return Llama 3.1's divisors of the frequencies: 8 for long waves, down to 1 for short waves.

    Source: `LlamaModel.generate_extra_tensors` of llama.cpp's convert_hf_to_gguf.py.
    """
    exponent = np.arange(0, tiny.rotary_dim, 2) / tiny.rotary_dim
    assert tiny.original_max_position_embeddings is not None
    turns = tiny.original_max_position_embeddings / (2 * np.pi * tiny.rope_theta**exponent)
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)  # 1 for 4 or more turns in the original context
    return (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)


def _type_of(name: str, types: Types) -> Type:
    if isinstance(types, Type):
        return types
    for pattern, data_type in types.items():
        if fnmatchcase(name, pattern):
            return data_type
    raise ValueError(f"types: expected a pattern that matches {name}, found {list(types)}")


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from pairs (i, i + D/2) to pairs (2i, 2i + 1).

    Source: llama.cpp's conversion of architecture `llama` (`LlamaModel.permute`).
    """
    n, width = rows.shape
    return rows.reshape(heads, 2, n // heads // 2, width).swapaxes(1, 2).reshape(n, width)


def _add_config(writer: gguf.GGUFWriter, tiny: Tiny, types: Types) -> None:
    writer.add_name(f"tiny {tiny.arch}")
    writer.add_context_length(tiny.max_position_embeddings)
    add_sizes(writer, tiny)
    if tiny.num_local_experts:
        writer.add_expert_count(tiny.num_local_experts)
        writer.add_expert_used_count(2)
    if tiny.arch in ("phi3", "phimoe"):
        original = tiny.original_max_position_embeddings or tiny.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        if tiny.original_max_position_embeddings:
            ratio = tiny.max_position_embeddings / original
            factor = math.sqrt(1 + math.log(ratio) / math.log(original))
            writer.add_rope_scaling_attn_factors(factor)
        writer.add_sliding_window(tiny.sliding_window or 0)
    else:
        writer.add_vocab_size(tiny.vocab_size)
        if tiny.rope_scaling_factor:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(tiny.rope_scaling_factor)
        if tiny.sliding_window:
            writer.add_sliding_window(tiny.sliding_window)
    name = f"MOSTLY_{types.name}" if isinstance(types, Type) else "MOSTLY_Q4_K_M"
    writer.add_file_type(LlamaFileType.__members__.get(name, LlamaFileType.GUESSED))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


# Each piece is two earlier pieces or characters joined, so it can be built by merging pairs.
_MERGES = "▁t he in ▁a ▁the er ▁w on ▁s nd ▁and or ▁f ing is ▁is ll"
_CHARACTERS = "▁" + string.ascii_letters + string.digits + ".,'!?"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '<|user|>\\n' + message['content'] + '<|end|>\\n<|assistant|>\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>\\n' }}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Case:
    """A model whose reference logits are in golden/phi3.npz under the case's name."""

    name: str
    tiny: Tiny
    types: Types
    seed: int

    def write(self, path: str | Path) -> Path:
        """Write the file that the reference logits belong to. It has no vocabulary."""
        return write_model(path, self.tiny, self.types, seed=self.seed, tokenizer=False)


def windowed() -> Case:
    """Return the case of a window that a long prompt exceeds many times.

    golden/phi3.npz has the logits of the last tokens.
    """
    tiny = Tiny(vocab_size=80, sliding_window=64, max_position_embeddings=4000)
    return Case("windowed", tiny, Q4_K_M, 200)


def cases() -> list[Case]:
    """Return a case for each type, and a case for each other feature that files may have."""
    plain = Tiny(vocab_size=80)  # a small vocabulary keeps the stored logits small
    moe = replace(plain, arch="phimoe", intermediate_size=256, num_local_experts=6)
    moe = replace(moe, original_max_position_embeddings=32)
    by_type = [Case(t.name, plain, t, seed) for seed, t in enumerate(TYPES)]
    mixes = {
        "mix": plain,
        "llama": replace(plain, arch="llama"),
        "tied": replace(plain, tie_word_embeddings=True),
        "window": replace(plain, sliding_window=5),
        "partial_rope": replace(plain, rope_dimension_count=48),
        "long_factors": replace(plain, original_max_position_embeddings=16),
        "short_factors": replace(plain, original_max_position_embeddings=32),
        "at_original": replace(plain, original_max_position_embeddings=24),
        "beyond_original": replace(plain, original_max_position_embeddings=23),
        "llama3": replace(plain, arch="llama", original_max_position_embeddings=64),
        "mistral": replace(plain, arch="llama", sliding_window=5),
        "qwen2": replace(plain, arch="qwen2"),
        "phi4_mini": replace(
            plain,
            rope_dimension_count=48,
            original_max_position_embeddings=16,
            tie_word_embeddings=True,
        ),
        "phimoe": moe,
        "phimoe_beyond_original": replace(moe, original_max_position_embeddings=16),
        "phimoe_window": replace(moe, sliding_window=5),
        "crosses_original": replace(plain, original_max_position_embeddings=28),
        "linear_scaling": replace(plain, arch="llama", rope_scaling_factor=4.0),
    }
    return by_type + [
        Case(name, tiny, Q4_K_M, 100 + i) for i, (name, tiny) in enumerate(mixes.items())
    ]
