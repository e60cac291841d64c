"""Quantized matrices in MLX's affine layout: value = scale * code + bias, in groups of a row.

Every type keeps its values exactly, up to the float32 rounding of the addition:

- Types with groups of 32 (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K) fit MLX's layout.
- For groups of 16 (Q6_K, Q2_K) MLX has no kernel. The codes are stored once, with two sets of
  scales for groups of 32: `scales` applies to the first half of a group, `scales2` to the second.
- In Q3_K the products of a 6-bit scale and a 3-bit code span 253 integers, so the products are
  stored as codes of 8 bits. One scale for each block of 256 remains, stored for groups of 128.

The codes of a row are one stream of bits, least significant bit first, as MLX reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from phicore.backend.host import cpu_count
from phicore.gguf.blocks import BLOCKS, Q3_K
from phicore.gguf.quants import affine
from phicore.gguf.reader import GGUFTensor

Type = GGMLQuantizationType
TILE_CODES = 1 << 20  # the number of codes that a thread unpacks at a time


@dataclass(frozen=True)
class Layout:
    """MLX's storage of a GGUF type.

    Attributes:
        is_split: Whether each half of a group has its own scale and bias.
    """

    bits: int
    group_size: int = 32
    is_split: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Bits of memory per weight, float32 scales and biases included."""
        return self.bits + (128 if self.is_split else 64) / self.group_size


LAYOUTS = {
    block.type: Layout(block.bits, is_split=block.group_size == 16) for block in BLOCKS.values()
} | {Type.Q3_K: Layout(8, group_size=128)}

Arrays = dict[str, np.ndarray]


def transcode(tensors: Sequence[GGUFTensor]) -> Arrays:
    """Convert tensors of one type, stacked along the rows to (N, K), to MLX's affine layout.

    Returns:
        `codes` (N, K * bits / 32) uint32; `scales` and `biases` (N, K / group size) float32. A
        split layout also has `scales2` and `biases2`.
    """
    layout = LAYOUTS[tensors[0].type]
    rows, columns = sum(t.shape[0] for t in tensors), tensors[0].shape[1]
    groups = columns // layout.group_size
    whole: Arrays = {"codes": np.empty((rows, columns * layout.bits // 32), np.uint32)}
    for name in ("scales", "biases", *(("scales2", "biases2") if layout.is_split else ())):
        whole[name] = np.empty((rows, groups), np.float32)

    def fill(tile: tuple[int, GGMLQuantizationType, np.ndarray]) -> None:
        start, ggml_type, data = tile
        for name, part in _transcode_rows(ggml_type, data).items():
            whole[name][start : start + len(part)] = part

    with ThreadPoolExecutor(cpu_count()) as threads:
        for _ in threads.map(fill, _tiles(tensors, max(1, TILE_CODES // columns))):
            pass
    return whole


def _tiles(
    tensors: Sequence[GGUFTensor], rows: int
) -> Iterator[tuple[int, GGMLQuantizationType, np.ndarray]]:
    """Yield the stacked tensors in tiles of up to `rows` rows: first row, type, bytes."""
    start = 0
    for tensor in tensors:
        for row in range(0, tensor.shape[0], rows):
            yield start + row, tensor.type, tensor.data[row : row + rows]
        start += tensor.shape[0]


def _transcode_rows(ggml_type: GGMLQuantizationType, data: np.ndarray) -> Arrays:
    layout, found = LAYOUTS[ggml_type], affine(ggml_type, data)
    codes, scales, biases = found.codes, found.scales, found.biases
    if ggml_type == Type.Q3_K:
        codes, scales = _q3_k_products(data, codes, scales)
        biases = -128 * scales
    elif biases is None:
        biases = -found.offset * scales
    arrays = {"codes": packed(codes, layout.bits)}
    if not layout.is_split:
        return {**arrays, "scales": scales, "biases": biases}
    arrays |= {"scales": scales[:, ::2], "biases": biases[:, ::2]}
    return {**arrays, "scales2": scales[:, 1::2], "biases2": biases[:, 1::2]}


def _q3_k_products(
    data: np.ndarray, codes: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rewrite Q3_K as scale * (code - 128), where a code holds the product of a scale and a code.

    The products are -124 to 128, so 128 - product fits a byte and 128 + product does not. The
    returned scale is therefore minus the scale of the block, given once for each half of the block.

    Returns:
        The codes, (N, K) uint8, and the scales, (N, K / 128) float32.
    """
    blocks = data.reshape(len(data), -1, Q3_K.size)
    d = np.ascontiguousarray(Q3_K.d.of(blocks)).view("<f2").astype(np.float32)  # (N, blocks, 1)
    # Exact, since `scales` are integers times d. Where d is 0 or not finite, any integer will do.
    is_number = (d != 0) & np.isfinite(d)
    integers = scales.reshape(*d.shape[:2], 16) / np.where(is_number, d, 1)
    integers = np.where(is_number, integers, 0).astype(np.int16)
    products = (codes.reshape(*integers.shape, 16).astype(np.int16) - Q3_K.offset) * integers[
        ..., None
    ]
    codes = (128 - products).astype(np.uint8).reshape(codes.shape)
    return codes, np.repeat(-d[:, :, 0], 2, axis=1)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes (N, K) uint8 below 2**bits into a stream of bits a row.

    K must be a multiple of 32.

    Returns:
        (N, K * bits / 32) uint32.
    """
    rows = len(codes)
    word = np.ascontiguousarray(codes)
    if bits == 8:
        return word.view("<u4")
    # A word of `size` bits holds codes in its `width` least significant bits.
    width, size = bits, 8
    while width % 8:
        wide = word.view(f"<u{size // 4}")
        low = wide & wide.dtype.type((1 << width) - 1)
        word = low | (wide >> wide.dtype.type(size)) << wide.dtype.type(width)
        width, size = 2 * width, 2 * size
    used = word.view(np.uint8).reshape(rows, -1, size // 8)[:, :, : width // 8]
    return np.ascontiguousarray(used).reshape(rows, -1).view("<u4")


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack the streams of `packed`, (N, K * bits / 32) uint32, to codes (N, K) uint8."""
    rows = len(words)
    used = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return used
    width, size = bits, 8
    while width % 8:
        width, size = 2 * width, 2 * size
    if width == size:
        word = used.view(f"<u{size // 8}")
    else:
        spread = np.zeros((rows, used.shape[1] * 8 // width, size // 8), np.uint8)
        spread[:, :, : width // 8] = used.reshape(rows, -1, width // 8)
        word = spread.reshape(rows, -1).view(f"<u{size // 8}")
    while size > 8:
        width, size = width // 2, size // 2
        low = word & word.dtype.type((1 << width) - 1)
        word = (low | (word >> word.dtype.type(width)) << word.dtype.type(size)).view(
            f"<u{size // 8}"
        )
    return word.reshape(rows, -1)


def dequantized(arrays: Arrays, layout: Layout) -> np.ndarray:
    """Compute the values of rows in MLX's affine layout with NumPy, (N, K) float32."""
    groups = arrays["scales"].shape
    values = unpacked(arrays["codes"], layout.bits).astype(np.float32)
    if layout.is_split:
        values = values.reshape(*groups, 2, layout.group_size // 2)
        scales, biases = (
            np.stack([arrays[name], arrays[f"{name}2"]], axis=2) for name in ("scales", "biases")
        )
    else:
        values = values.reshape(*groups, layout.group_size)
        scales, biases = arrays["scales"], arrays["biases"]
    values *= scales[..., None]
    values += biases[..., None]
    return values.reshape(groups[0], -1)
