"""Unpacks quantized blocks to the affine form, which ten of ggml's types have.

In this form, values are in groups of 16 or 32 along a row:

    value = scale * (code - offset) + bias

The code is unsigned and has few bits. The offset is an integer that belongs to the type. Scale and
bias are float32 and belong to the group; the bias is 0 if the type has none. A backend packs codes,
scales and biases in the layout that its kernels read. `Affine.dequantize` is equal to
`gguf.quants.dequantize` bit for bit, for every block. `blocks` describes the bytes of a block.

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
    """A matrix of N rows by K columns in affine form.

    Attributes:
        codes: The codes, (N, K) uint8, below 2**bits.
        scales: The scales of groups, (N, K / group_size) float32.
        biases: The biases of groups, (N, K / group_size) float32, or None if all are 0.
        offset: The number that is subtracted from a code.
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
        """Return the values, (N, K) float32, rounded exactly as `gguf.quants` rounds them."""
        codes = self.codes.reshape(*self.scales.shape, -1).astype(np.float32) - self.offset
        with np.errstate(invalid="ignore"):  # an infinite scale times 0
            values = self.scales[..., None] * codes
            if self.biases is not None:
                values += self.biases[..., None]
        return values.reshape(self.codes.shape)


def is_affine(ggml_type: GGMLQuantizationType) -> bool:
    """Return whether `affine` can unpack the type."""
    return ggml_type in BLOCKS


def codes(ggml_type: GGMLQuantizationType, data: Any) -> Any:
    """Unpack the codes of quantized rows, (N, row bytes) uint8, to (N, K) uint8.

    The codes of Q8_0 are two's complement. The array may be of any library with NumPy's operators.
    """
    block = BLOCKS[ggml_type]
    blocks = data.reshape(-1, block.size)
    found = _fields(block.low, block.low_bits, blocks)
    if block.high:
        found = found | _fields(block.high, block.high_bits, blocks) << np.uint8(block.low_bits)
    return found.reshape(data.shape[0], -1)


def affine(ggml_type: GGMLQuantizationType, data: np.ndarray) -> Affine:
    """Unpack quantized rows to the affine form.

    Scales that are NaN or infinite are kept, without a NumPy warning.

    Args:
        ggml_type: A type for which `is_affine` is true.
        data: The rows, (N, row bytes) uint8.
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
    if ggml_type == Type.Q8_0:  # from two's complement to unsigned codes with an offset
        found, offset = found ^ np.uint8(0x80), 128
    return Affine(
        codes=found,
        scales=scales.reshape(rows, -1),
        biases=None if biases is None else biases.reshape(rows, -1),
        offset=offset,
        bits=block.bits,
    )


def _halves(field: Field, blocks: np.ndarray) -> np.ndarray:
    """Read a float16 field of each block as float32: (blocks, 1)."""
    return np.ascontiguousarray(field.of(blocks)).view("<f2").astype(np.float32)


def _fields(field: Bits, bits: int, blocks: Any) -> Any:
    """Unpack a field with `bits` bits of every code: (blocks, K)."""
    runs = field.of(blocks).reshape(-1, field.size // field.run, field.run)
    return _split(runs, bits).reshape(blocks.shape[0], -1)


def _split(packed: Any, bits: int) -> Any:
    """Split bytes into parts of `bits` bits, lowest first: (..., n) gives (..., 8 / bits, n)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(*[1] * (packed.ndim - 1), -1, 1)
    return (packed[..., None, :] >> shifts) & np.uint8(2**bits - 1)


# ---- unpacking the integers for `d` and `dmin`: (blocks, bytes) to (blocks, groups) --------------

Integers = tuple[np.ndarray, np.ndarray | None]


def _q2_k(packed: np.ndarray) -> Integers:
    return (packed & np.uint8(15)).astype(np.float32), (packed >> np.uint8(4)).astype(np.float32)


def _q3_k(packed: np.ndarray) -> Integers:
    low = _split(packed[:, :8], 4).reshape(-1, 16)
    high = _split(packed[:, 8:], 2).reshape(-1, 16)
    return (low | high << np.uint8(4)).astype(np.float32) - 32, None


def _q4_k(packed: np.ndarray) -> Integers:
    """Unpack the integers of Q4_K and Q5_K, which have six bits each."""
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
