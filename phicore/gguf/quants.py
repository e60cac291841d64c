"""What the blocks of a quantized tensor mean, in one form for all types that have it.

The values of these types are, in groups of 16 or 32 along a row,

    value = scale * (code - offset) + bias

with an unsigned code of few bits, an integer offset of the type, and float32 scales and biases of
the group (bias 0 where a type has none). A backend packs codes, scales and biases in the layout
that its kernels read. `gguf.quants.dequantize` stays the oracle: `Affine.dequantize` is equal to it
bit for bit, for every block.

Sources: ggml-common.h (block layouts), ggml-quants.c (`dequantize_row_*`), gguf/quants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

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
    return ggml_type in _UNPACK


def codes(ggml_type: GGMLQuantizationType, data: Any) -> Any:
    """The codes of quantized rows of any such type but Q8_0, (N, row bytes) uint8: (N, K) uint8.

    Of arrays of any library that has NumPy's operators.
    """
    _, block_bytes = GGML_QUANT_SIZES[ggml_type]
    return _CODES[ggml_type](data.reshape(-1, block_bytes)).reshape(data.shape[0], -1)


def affine(ggml_type: GGMLQuantizationType, data: np.ndarray) -> Affine:
    """Take quantized rows apart. A scale that is NaN or infinite comes through without a warning.

    Args:
        ggml_type: A type for which `is_affine` is true.
        data: (N, row bytes) uint8.
    """
    _, block_bytes = GGML_QUANT_SIZES[ggml_type]
    rows = data.shape[0]
    offset, bits, unpack = _UNPACK[ggml_type]
    with np.errstate(invalid="ignore"):  # an infinite scale times 0
        codes, scales, biases = unpack(data.reshape(-1, block_bytes))
    return Affine(
        codes=codes.reshape(rows, -1),
        scales=scales.reshape(rows, -1),
        biases=None if biases is None else biases.reshape(rows, -1),
        offset=offset,
        bits=bits,
    )


Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # codes, scales, biases; a row per block


def _f16(blocks: np.ndarray, start: int) -> np.ndarray:
    """The float16 at a byte of each block, as float32: (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _fields(packed: Any, bits: int) -> Any:
    """Split bytes into fields, lowest first: (..., n) gives (..., 8 / bits, n)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(*[1] * (packed.ndim - 1), -1, 1)
    return (packed[..., None, :] >> shifts) & np.uint8(2**bits - 1)


# ---- blocks of 32 --------------------------------------------------------------------------


def _q4_0(b: np.ndarray) -> Parts:
    return _q4_0_codes(b), _f16(b, 0), None


def _q4_0_codes(b: Any) -> Any:
    return _fields(b[:, 2:], 4)


def _q4_1(b: np.ndarray) -> Parts:
    return _q4_1_codes(b), _f16(b, 0), _f16(b, 2)


def _q4_1_codes(b: Any) -> Any:
    return _fields(b[:, 4:], 4)


def _high_bits(b: Any, start: int) -> Any:
    """Bit j of a 32-bit word is the fifth bit of code j: (blocks, 2, 16)."""
    bits = _fields(b[:, start : start + 4, None], 1)
    return bits.reshape(-1, 2, 16) << np.uint8(4)


def _q5_0(b: np.ndarray) -> Parts:
    return _q5_0_codes(b), _f16(b, 0), None


def _q5_0_codes(b: Any) -> Any:
    return _fields(b[:, 6:], 4) | _high_bits(b, 2)


def _q5_1(b: np.ndarray) -> Parts:
    return _q5_1_codes(b), _f16(b, 0), _f16(b, 2)


def _q5_1_codes(b: Any) -> Any:
    return _fields(b[:, 8:], 4) | _high_bits(b, 4)


def _q8_0(b: np.ndarray) -> Parts:
    return b[:, 2:] ^ np.uint8(0x80), _f16(b, 0), None  # two's complement to offset 128


# ---- super-blocks of 256 -------------------------------------------------------------------


def _q2_k(b: np.ndarray) -> Parts:
    scales = b[:, :16]
    return (
        _q2_k_codes(b),
        _f16(b, 80) * (scales & np.uint8(15)).astype(np.float32),
        -(_f16(b, 82) * (scales >> np.uint8(4)).astype(np.float32)),
    )


def _q2_k_codes(b: Any) -> Any:
    return _fields(b[:, 16:80].reshape(-1, 2, 32), 2)  # (blocks, 2 halves, 4 fields, 32)


def _q3_k(b: np.ndarray) -> Parts:
    low_scales = _fields(b[:, 96:104], 4).reshape(-1, 16)
    high_scales = _fields(b[:, 104:108], 2).reshape(-1, 16)
    scales = (low_scales | high_scales << np.uint8(4)).astype(np.float32) - 32
    return _q3_k_codes(b), _f16(b, 108) * scales, None


def _q3_k_codes(b: Any) -> Any:
    low = _fields(b[:, 32:96].reshape(-1, 2, 32), 2)  # (blocks, 2, 4, 32)
    high = _fields(b[:, :32], 1).reshape(-1, 2, 4, 32)  # bit 4 * half + field
    return low | high << np.uint8(2)


def _scales_and_minima(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 6-bit scales and minima of Q4_K and Q5_K: (blocks, 12) gives two (blocks, 8)."""
    low, minima, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    return (
        np.concatenate([low & 63, high & 15 | low >> 2 & 48], axis=1).astype(np.float32),
        np.concatenate([minima & 63, high >> 4 | minima >> 2 & 48], axis=1).astype(np.float32),
    )


def _q4_k(b: np.ndarray) -> Parts:
    scales, minima = _scales_and_minima(b[:, 4:16])
    return _q4_k_codes(b), _f16(b, 0) * scales, -(_f16(b, 2) * minima)


def _q4_k_codes(b: Any) -> Any:
    return _fields(b[:, 16:].reshape(-1, 4, 32), 4)  # (blocks, 4, 2, 32)


def _q5_k(b: np.ndarray) -> Parts:
    scales, minima = _scales_and_minima(b[:, 4:16])
    return _q5_k_codes(b), _f16(b, 0) * scales, -(_f16(b, 2) * minima)


def _q5_k_codes(b: Any) -> Any:
    low = _fields(b[:, 48:].reshape(-1, 4, 32), 4)
    high = _fields(b[:, 16:48], 1).reshape(-1, 4, 2, 32)
    return low | high << np.uint8(4)


def _q6_k(b: np.ndarray) -> Parts:
    scales = b[:, 192:208].view(np.int8).astype(np.float32)
    return _q6_k_codes(b), _f16(b, 208) * scales, None


def _q6_k_codes(b: Any) -> Any:
    low = _fields(b[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 2, 4, 32)
    high = _fields(b[:, 128:192].reshape(-1, 2, 32), 2)  # (blocks, 2, 4, 32)
    return low | high << np.uint8(4)


# Type: offset, bits of a code, how to unpack a block.
_UNPACK: dict[GGMLQuantizationType, tuple[int, int, Callable[[np.ndarray], Parts]]] = {
    Type.Q4_0: (8, 4, _q4_0),
    Type.Q4_1: (0, 4, _q4_1),
    Type.Q5_0: (16, 5, _q5_0),
    Type.Q5_1: (0, 5, _q5_1),
    Type.Q8_0: (128, 8, _q8_0),
    Type.Q2_K: (0, 2, _q2_k),
    Type.Q3_K: (4, 3, _q3_k),
    Type.Q4_K: (0, 4, _q4_k),
    Type.Q5_K: (0, 5, _q5_k),
    Type.Q6_K: (32, 6, _q6_k),
}
AFFINE_TYPES = tuple(_UNPACK)
_CODES: dict[GGMLQuantizationType, Callable[[Any], Any]] = {
    Type.Q4_0: _q4_0_codes,
    Type.Q4_1: _q4_1_codes,
    Type.Q5_0: _q5_0_codes,
    Type.Q5_1: _q5_1_codes,
    Type.Q2_K: _q2_k_codes,
    Type.Q3_K: _q3_k_codes,
    Type.Q4_K: _q4_k_codes,
    Type.Q5_K: _q5_k_codes,
    Type.Q6_K: _q6_k_codes,
}
