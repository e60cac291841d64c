"""GPU kernels that read the file's blocks of Q6_K, Q3_K and Q2_K, which do not suit MLX's groups.

They read 6.6 bits a weight for Q6_K, where MLX's layout reads 16 in two passes, 3.4 for Q3_K and
2.6 for Q2_K. One source text serves Metal, CUDA and the C++ compiler of the tests; `PREAMBLES`
holds the differences.

A kernel is used only after it has computed correct values on this machine (see `is_usable`).
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from phicore.backend import Array
from phicore.gguf.blocks import BLOCKS, Field
from phicore_mlx import devices

Type = GGMLQuantizationType
FEW_ROWS = 8
"""Largest number of activation rows that are multiplied by the blocks directly.

Each row then reads the blocks anew. For more rows the blocks are expanded once.
"""
MOST_ROWS = 32768
"""Number of rows that a kernel expands at a time. The second axis of a CUDA grid ends at 65535."""

PREAMBLES = {
    "metal": """
#define PHI_FUNCTION inline
#define PHI_BITS(u) as_type<float>(u)
#define PHI_SUM(x) simd_sum(x)
""",
    "cuda": """
#define PHI_FUNCTION __device__ inline
#define PHI_BITS(u) __uint_as_float(u)
#define PHI_SUM(x) phi_sum(x)
typedef unsigned int uint;
typedef unsigned char uchar;
__device__ inline float phi_sum(float x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
""",
}
"""Each platform's spelling of a function, a float made of its bits, and a sum over 32 threads."""

LANES = {"metal": "thread_index_in_simdgroup", "cuda": "(threadIdx.x % 32)"}
PLACES = {
    "metal": "thread_position_in_grid.{}",
    "cuda": "(blockIdx.{0} * blockDim.{0} + threadIdx.{0})",
}
"""Each platform's expression for a thread's position along an axis of the grid.

These cannot be macros, because MLX looks for Metal's names in the body of a kernel.
"""

# Pointer types are template arguments, since a pointer type of Metal includes an address space.
# <Q6_K.high> stands for the first byte of the field in a block (see `text`).
HEADER = """
template <typename P> PHI_FUNCTION float phi_half(P at) {
  uint bits = uint(at[0]) | uint(at[1]) << 8;
  uint size = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  if (size < 0x400u) {
    float small = float(size) * 5.9604644775390625e-8f;
    return sign ? -small : small;
  }
  uint exponent = size >= 0x7c00u ? 0x7f800000u : 112u << 23;
  return PHI_BITS(sign | ((size << 13) + exponent));
}

template <typename P> PHI_FUNCTION float phi_q6_k(P block, uint i) {
  uint side = i >> 7, field = (i >> 5) & 3u, l = i & 31u;
  uint low = uint(block[<Q6_K.low>u + side * 64u + (field & 1u) * 32u + l])
    >> (field >> 1) * 4u & 15u;
  uint high = uint(block[<Q6_K.high>u + side * 32u + l]) >> field * 2u & 3u;
  int scale = int(block[<Q6_K.scales>u + (i >> 4)]);
  scale = scale > 127 ? scale - 256 : scale;
  return phi_half(block + <Q6_K.d>) * float(scale) * float(int(low | high << 4) - <Q6_K.offset>);
}

template <typename P> PHI_FUNCTION float phi_q3_k(P block, uint i) {
  uint side = i >> 7, field = (i >> 5) & 3u, l = i & 31u, s = i >> 4;
  uint low = uint(block[<Q3_K.low>u + side * 32u + l]) >> field * 2u & 3u;
  uint high = uint(block[<Q3_K.high>u + l]) >> (side * 4u + field) & 1u;
  uint scale = uint(block[<Q3_K.scales>u + (s & 7u)]) >> (s >> 3) * 4u & 15u;
  scale |= (uint(block[<Q3_K.scales>u + 8u + (s & 3u)]) >> (s >> 2) * 2u & 3u) << 4;
  return phi_half(block + <Q3_K.d>) * float(int(scale) - 32)
    * float(int(low | high << 2) - <Q3_K.offset>);
}

template <typename P> PHI_FUNCTION float phi_q2_k(P block, uint i) {
  uint side = i >> 7, field = (i >> 5) & 3u, l = i & 31u;
  uint code = uint(block[<Q2_K.low>u + side * 32u + l]) >> field * 2u & 3u;
  uint both = uint(block[<Q2_K.scales>u + (i >> 4)]);
  return phi_half(block + <Q2_K.d>) * float(both & 15u) * float(code)
    - phi_half(block + <Q2_K.dmin>) * float(both >> 4);
}

template <typename P, typename X>
PHI_FUNCTION float phi_dot_TYPE(P row, X x, uint columns, uint lane) {
  float sum = 0;
  for (uint start = 0; start < columns; start += 256u, row += BYTES) {
    for (uint j = 0; j < 8u; j++) {
      uint i = lane * 8u + j;
      sum += phi_TYPE(row, i) * x[start + i];
    }
  }
  return sum;
}
"""

PRODUCT = """
uint row = PLACE_y, m = PLACE_z, lane = LANE;
if (row < uint(ROWS)) {
  size_t at = size_t(row) * (COLUMNS / 256 * BYTES);
  float sum = phi_dot_TYPE(blocks + at, x + m * uint(COLUMNS), uint(COLUMNS), lane);
  sum = PHI_SUM(sum);
  if (lane == 0) y[m * uint(ROWS) + row] = sum;
}
"""

EXPANSION = """
uint column = PLACE_x, n = PLACE_y;
if (column < uint(COLUMNS)) {
  size_t at = (size_t(ids[n]) * (COLUMNS / 256) + column / 256u) * BYTES;
  values[size_t(n) * COLUMNS + column] = T(phi_TYPE(blocks + at, column & 255u));
}
"""

TYPES = {Type.Q6_K: "q6_k", Type.Q3_K: "q3_k", Type.Q2_K: "q2_k"}


def text(source: str, ggml_type: GGMLQuantizationType, place: str = "", lane: str = "") -> str:
    """Fill in the placeholders of a kernel's source text.

    Args:
        place: Expression for a thread's position, with {} for the axis (see `PLACES`).
        lane: Expression for a thread's lane (see `LANES`).
    """
    for axis in "xyz":
        source = source.replace(f"PLACE_{axis}", place.format(axis))
    source = re.sub(r"<(Q\w+)\.(\w+)>", lambda found: str(_fact(*found.groups())), source)
    size = str(BLOCKS[ggml_type].size)
    return source.replace("LANE", lane).replace("TYPE", TYPES[ggml_type]).replace("BYTES", size)


def _fact(type_name: str, name: str) -> int:
    """Return the first byte of a field of a block type, or another number of its description."""
    found = getattr(BLOCKS[Type[type_name]], name)
    return found.start if isinstance(found, Field) else int(found)


@cache
def _kernel(name: str, ggml_type: GGMLQuantizationType, label: str = "") -> Any:
    """Return the kernel `product` or `expansion` for a type.

    Kernels for which MLX generates different source text need different labels: Metal compiles a
    kernel anew whenever the source of its name changes.
    """
    kind = devices.gpu_kind()
    assert kind is not None
    make = mx.fast.metal_kernel if kind == "metal" else mx.fast.cuda_kernel
    inputs, outputs, source = {
        "product": (["x", "blocks"], ["y"], PRODUCT),
        "expansion": (["ids", "blocks"], ["values"], EXPANSION),
    }[name]
    return make(
        name=f"phi_{name}{label}_{TYPES[ggml_type]}",
        input_names=inputs,
        output_names=outputs,
        source=text(source, ggml_type, PLACES[kind], LANES[kind]),
        header=PREAMBLES[kind] + text(HEADER, ggml_type),
    )


def product(x: Array, blocks: Array, ggml_type: GGMLQuantizationType) -> Array:
    """Multiply (M, K) float32 by blocks (N, bytes of a row) uint8; return (M, N) float32.

    This is fast for few rows of activations only, since each row reads all blocks.
    """
    (m, columns), rows = x.shape, blocks.shape[0]
    (y,) = _kernel("product", ggml_type)(
        inputs=[x, blocks],
        template=[("ROWS", rows), ("COLUMNS", columns)],
        grid=(32, rows, m),
        threadgroup=(32, 8, 1),
        output_shapes=[(m, rows)],
        output_dtypes=[mx.float32],
    )
    return y


def expanded(ids: Array, blocks: Array, ggml_type: GGMLQuantizationType, dtype: Any) -> Array:
    """Dequantize the rows `ids`, (n,) int32, of blocks (N, bytes of a row); return (n, K)."""
    columns = blocks.shape[1] // BLOCKS[ggml_type].size * 256
    parts = []
    for start in range(0, ids.shape[0], MOST_ROWS):
        some = ids[start : start + MOST_ROWS]
        # MLX passes an input of fewer than 8 elements in another kind of memory (see `_kernel`).
        label = "_few" if some.shape[0] < 8 else ""
        parts += _kernel("expansion", ggml_type, label)(
            inputs=[some, blocks],
            template=[("T", dtype), ("COLUMNS", columns)],
            grid=(columns, some.shape[0], 1),
            threadgroup=(256, 1, 1),
            output_shapes=[(some.shape[0], columns)],
            output_dtypes=[dtype],
        )
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


@cache
def is_usable(ggml_type: GGMLQuantizationType) -> bool:
    """Return whether the kernels of a type work here, by trying them on rows of known values."""
    if devices.gpu_kind() is None or ggml_type not in TYPES:
        return False
    from gguf.quants import dequantize

    random, block = np.random.default_rng(0), BLOCKS[ggml_type]
    data = random.integers(0, 256, (5, 3, block.size), dtype=np.uint8)
    for field in (block.d, block.dmin):
        halves = random.normal(size=(5, 3, 1)).astype("<f2").view(np.uint8)
        field.of(data)[...] = halves[..., : field.size]
    data = data.reshape(5, -1)
    values = dequantize(data, ggml_type)
    x = random.normal(size=(2, values.shape[1])).astype(np.float32)
    try:
        blocks, ids = mx.array(data), mx.arange(5, dtype=mx.int32)
        on_gpu = (
            expanded(ids, blocks, ggml_type, mx.float32),
            product(mx.array(x), blocks, ggml_type),
        )
        mx.eval(on_gpu)
        found, y = (np.array(a) for a in on_gpu)
    except (RuntimeError, ValueError):  # MLX raises these for a kernel that does not compile
        return False
    expected = x.astype(np.float64) @ values.T
    return bool(
        np.allclose(found, values, rtol=1e-6, atol=0)
        and np.linalg.norm(y - expected) <= 1e-5 * np.linalg.norm(expected)
    )
