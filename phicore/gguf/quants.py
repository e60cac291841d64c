"""What the blocks of a quantized tensor mean, in one form for all types that have it.

The values of these types are, in groups of 16 or 32 along a row,

    value = scale * (code - offset) + bias

with an unsigned code of few bits, an integer offset of the type, and float32 scales and biases of
the group (bias 0 where a type has none). A backend packs codes, scales and biases in the layout
that its kernels read. `gguf.quants.dequantize` stays the oracle: `Affine.dequantize` is equal to it
bit for bit, for every block. Where a block has what is said in `blocks`.

Sources: ggml-quants.c (`dequantize_row_*`), gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from phicore.gguf.blocks import BLOCKS, Bits, Field

Type = GGMLQuantizationType


@dataclass(frozen=True)
class Affine:
    """N rows by K columns in affine form.

    Attributes:
        codes: (N, K) uint8, below 2**bits.
        scales: (N, K / group_size) float32.
        biases: (N, K / group_size) float32, or None where all are 0.
        offset: What is subtracted from a code.
    """

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None
    offset: int
    bits: int

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> np.ndarray:
        """The values, (N, K) float32, rounded as the reference rounds them."""
        codes = self.codes.reshape(*self.scales.shape, -1).astype(np.float32) - self.offset
        with np.errstate(invalid="ignore"):  # as `affine`
            values = self.scales[..., None] * codes
            if self.biases is not None:
                values += self.biases[..., None]
        return values.reshape(self.codes.shape)


def is_affine(ggml_type: GGMLQuantizationType) -> bool:
    """Whether `affine` knows the type."""
    return ggml_type in BLOCKS


def codes(ggml_type: GGMLQuantizationType, data: Any) -> Any:
    """The codes of quantized rows, (N, row bytes) uint8: (N, K) uint8. Those of Q8_0 are signed.

    The arrays may be of any library that has NumPy's operators.
    """
    block = BLOCKS[ggml_type]
    blocks = data.reshape(-1, block.size)
    found = _fields(block.low, block.low_bits, blocks)
    if block.high:
        found = found | _fields(block.high, block.high_bits, blocks) << np.uint8(block.low_bits)
    return found.reshape(data.shape[0], -1)


def affine(ggml_type: GGMLQuantizationType, data: np.ndarray) -> Affine:
    """Take quantized rows apart. A scale that is NaN or infinite comes through without a warning.

    Args:
        ggml_type: A type for which `is_affine` is true.
        data: (N, row bytes) uint8.
    """
    block, rows = BLOCKS[ggml_type], data.shape[0]
    blocks = data.reshape(-1, block.size)
    scales = _halves(block.d, blocks)  # (blocks, 1)
    biases = _halves(block.dmin, blocks) if block.dmin else None
    if block.scales:
        of_scales, of_biases = _INTEGERS[ggml_type](block.scales.of(blocks))
        with np.errstate(invalid="ignore"):  # an infinite scale times 0
            scales = scales * of_scales
            if biases is not None and of_biases is not None:
                biases = -(biases * of_biases)
    found, offset = codes(ggml_type, data), block.offset
    if ggml_type == Type.Q8_0:  # two's complement to codes with an offset
        found, offset = found ^ np.uint8(0x80), 128
    return Affine(
        codes=found,
        scales=scales.reshape(rows, -1),
        biases=None if biases is None else biases.reshape(rows, -1),
        offset=offset,
        bits=block.bits,
    )


def _halves(field: Field, blocks: np.ndarray) -> np.ndarray:
    """A float16 of each block, as float32: (blocks, 1)."""
    return np.ascontiguousarray(field.of(blocks)).view("<f2").astype(np.float32)


def _fields(field: Bits, bits: int, blocks: Any) -> Any:
    """Some bits of each code, lowest first: (blocks, K)."""
    runs = field.of(blocks).reshape(-1, field.size // field.run, field.run)
    return _split(runs, bits).reshape(blocks.shape[0], -1)


def _split(packed: Any, bits: int) -> Any:
    """Split bytes into fields, lowest first: (..., n) gives (..., 8 / bits, n)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(*[1] * (packed.ndim - 1), -1, 1)
    return (packed[..., None, :] >> shifts) & np.uint8(2**bits - 1)


# ---- the integers that `d` and `dmin` are multiplied by: (blocks, bytes) to (blocks, groups) ----

Integers = tuple[np.ndarray, np.ndarray | None]


def _q2_k(packed: np.ndarray) -> Integers:
    return (packed & np.uint8(15)).astype(np.float32), (packed >> np.uint8(4)).astype(np.float32)


def _q3_k(packed: np.ndarray) -> Integers:
    low = _split(packed[:, :8], 4).reshape(-1, 16)
    high = _split(packed[:, 8:], 2).reshape(-1, 16)
    return (low | high << np.uint8(4)).astype(np.float32) - 32, None


def _q4_k(packed: np.ndarray) -> Integers:
    """Six bits each, of Q4_K and Q5_K."""
    low, minima, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    return (
        np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=1).astype(np.float32),
        np.concatenate([minima & 63, high >> 4 | minima >> 2 & 48], axis=1).astype(np.float32),
    )


def _q6_k(packed: np.ndarray) -> Integers:
    return packed.view(np.int8).astype(np.float32), None


_INTEGERS: dict[GGMLQuantizationType, Callable[[np.ndarray], Integers]] = {
    Type.Q2_K: _q2_k,
    Type.Q3_K: _q3_k,
    Type.Q4_K: _q4_k,
    Type.Q5_K: _q4_k,
    Type.Q6_K: _q6_k,
}
AFFINE_TYPES = tuple(BLOCKS)
