"""Random weights of every type, and other code that the writers of random models share.

`phicore.testing.tiny_models` writes small files for the tests; a seed determines their bytes.
`phicore.lab.synthetic` writes files as large as real ones, for measuring speed.

Random numbers are raw PCG64 output, whose stream NumPy guarantees. They are turned into weights by
integer arithmetic and single roundings. So weights are the same on every machine and NumPy version.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, TokenType
from gguf import GGMLQuantizationType as Type

from phicore.gguf.blocks import BLOCKS, Field

# Types that the gguf package can quantize; `random_blocks` makes blocks of all other TYPES.
_QUANTIZABLE = (
    *(Type.F32, Type.F16, Type.BF16),
    *(Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.TQ1_0, Type.TQ2_0, Type.MXFP4),
)
# The standard deviation of values if the mean scale is 1 and everything but the scales is random
# bits; measured on 32000 blocks.
_STD = {
    Type.Q2_K: 15.2,
    Type.Q3_K: 45.1,
    Type.Q4_K: 285.5,
    Type.Q5_K: 583.6,
    Type.Q6_K: 1418.0,
    Type.IQ2_XXS: 55.6,
    Type.IQ2_XS: 58.1,
    Type.IQ2_S: 58.7,
    Type.IQ3_XXS: 148.0,
    Type.IQ3_S: 146.0,
    Type.IQ1_S: 7.51,
    Type.IQ1_M: 7.49,
    Type.IQ4_NL: 70.1,
    Type.IQ4_XS: 1294.0,
    Type.NVFP4: 6.09,
}
_FIRST = Field(0, 2)  # the float16 scale of types that `blocks` does not describe

TYPES = (*_QUANTIZABLE, *_STD)
"""Every type that `gguf.quants.dequantize` reads."""


def random_matrix(
    data_type: Type, rows: int, cols: int, rng: np.random.Generator, std: float
) -> np.ndarray:
    """Make random rows of a type for GGUFWriter: float32, float16 or the bytes of blocks."""
    if data_type in _QUANTIZABLE:
        return gguf.quants.quantize(std * normal(rng, rows, cols), data_type)
    return random_blocks(data_type, rows, cols, rng, std)


def random_blocks(
    data_type: Type, rows: int, cols: int, rng: np.random.Generator, std: float
) -> np.ndarray:
    """Make random valid blocks of a type that the gguf package reads but cannot write.

    Codes, signs, grid indices and sub-scales are random bits. Each block has its own scale and
    minimum, 0.5 to 1.5 times the mean, so that a test notices if blocks are mixed up.

    Returns:
        (rows, bytes of a row) uint8. The values have approximately mean 0 and standard deviation
        `std`.
    """
    block_size, block_bytes = GGML_QUANT_SIZES[data_type]
    blocks = _bytes(rng, rows * cols // block_size, block_bytes)
    n, scale = len(blocks), std / _STD[data_type]
    if data_type == Type.NVFP4:
        # A block has four scales of 8 bits. Codes are doubled values, so they use half the scale.
        blocks[:, :4] = gguf.quants.NVFP4.fp32_to_ue4m3(2 * scale * _spread(rng, n, 4))
        return blocks.reshape(rows, -1)
    d = (scale * _spread(rng, n, 1)).astype("<f2")
    if data_type == Type.IQ1_M:
        # A quarter of the float16 scale is in the top nibble of each of the last four 16-bit words.
        nibbles = d.view("<u2") >> np.arange(0, 16, 4, dtype=np.uint16) & 0xF  # (n, 4)
        words = blocks[:, 48:].view("<u2") & 0x0FFF | nibbles << 12
        blocks[:, 48:] = words.view(np.uint8)
        return blocks.reshape(rows, -1)
    block = BLOCKS.get(data_type)
    (block.d if block else _FIRST).of(blocks)[...] = d.view(np.uint8)
    if block and block.dmin:
        mean_code = (2**block.bits - 1) / 2  # dmin / d at which the values have mean 0
        dmin = (scale * mean_code * _spread(rng, n, 1)).astype("<f2")
        block.dmin.of(blocks)[...] = dmin.view(np.uint8)
    return blocks.reshape(rows, -1)


def _bytes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Make random bytes from raw output, since the streams of Generator's methods may change."""
    size = math.prod(shape)
    words = rng.bit_generator.random_raw(-(-size // 8)).astype("<u8")
    return words.view(np.uint8)[:size].reshape(shape)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Make approximately normal float32 values, with mean 0 and standard deviation 1.

    Each is the sum of four uniform values.
    """
    uniform = _bytes(rng, *shape, 8).view("<u2")
    std = 65536 * np.sqrt(4 / 12)
    return ((uniform.sum(axis=-1, dtype=np.int64) - 2 * 65535) / std).astype(np.float32)


def _spread(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Make random factors in [0.5, 1.5), in steps of 1/256."""
    return 0.5 + _bytes(rng, *shape) / 256


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model. Names are those of transformers' `Phi3Config`."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 32064
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return self.head_dim


def add_sizes(writer: gguf.GGUFWriter, sizes: Sizes) -> None:
    """Write the metadata keys that every architecture has."""
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_head_count(sizes.num_attention_heads)
    writer.add_head_count_kv(sizes.num_key_value_heads)
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    writer.add_rope_dimension_count(sizes.rotary_dim)
    writer.add_rope_freq_base(sizes.rope_theta)


START = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))
_CONTROL = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")


def add_vocabulary(
    writer: gguf.GGUFWriter,
    words: Sequence[str],
    size: int,
    chat_template: str,
) -> None:
    """Write a SentencePiece vocabulary in Phi-3's order: bytes, words, then control tokens.

    Args:
        words: The words. An earlier word is merged first.
        size: The size of the vocabulary, which is padded with placeholders.

    Raises:
        ValueError: If the vocabulary is too small for the words.
    """
    tokens = [*START, *words, *_CONTROL]
    if size < len(tokens):
        raise ValueError(f"vocab_size: expected at least {len(tokens)}, found {size}")
    tokens += [f"<|placeholder{i + 1}|>" for i in range(size - len(tokens))]
    control = size - len(START) - len(words)
    ranks = [-float(i) for i in range(len(words))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(START) + ranks + [-1000.0] * control)
    writer.add_token_types(
        [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
        + [TokenType.BYTE] * 256
        + [TokenType.NORMAL] * len(words)
        + [TokenType.CONTROL] * control
    )
    writer.add_bos_token_id(tokens.index("<s>"))
    writer.add_eos_token_id(tokens.index("<|endoftext|>"))
    writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat_template)
