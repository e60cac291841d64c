"""The GPU kernel that makes random numbers; `phicore.backend.philox` has the algorithm.

One source text serves Metal, CUDA and the C++ compiler of the tests. The kernel is used only after
it has made the right bits on this machine (see `is_usable`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np

from phicore.backend import Array, philox
from phicore.backend.philox import MULTIPLIERS, NUMBERS, ROUNDS, WEYL
from phicore_mlx import devices
from phicore_mlx.blocks import PLACES

PREAMBLES = {
    "metal": "#define PHI_FUNCTION inline\ntypedef ulong phi_word;\n",
    "cuda": "#define PHI_FUNCTION __device__ inline\ntypedef unsigned int uint;\n"
    "typedef unsigned long long phi_word;\n",
}
"""Each platform's spelling of a function, and of an integer of 64 bits."""

HEADER = f"""
PHI_FUNCTION phi_word phi_upper(phi_word a, phi_word b) {{
  phi_word a_low = a & 0xffffffffu, a_high = a >> 32, b_low = b & 0xffffffffu, b_high = b >> 32;
  phi_word middle = a_high * b_low + (a_low * b_low >> 32);
  phi_word rest = a_low * b_high + (middle & 0xffffffffu);
  return a_high * b_high + (middle >> 32) + (rest >> 32);
}}

PHI_FUNCTION float phi_number(uint bits) {{
  float high = float(bits >> 16) * 65536.0f, low = float(bits & 0xffffu) + 0.5f;
  float number = (high + low) * {2.0**-32!r}f;
  return number < 1.0f ? number : {1 - 2.0**-24!r}f;
}}
"""

UNIFORMS = f"""
uint block = PLACE_x, row = PLACE_y;
if (block < uint(BLOCKS)) {{
  phi_word c0 = phi_word(block) + 1u, c1 = step[row], c2 = 0, c3 = 0;
  phi_word k0 = phi_word(key[2u * row]) | phi_word(key[2u * row + 1u]) << 32, k1 = 0;
  for (int n = 0; n < {ROUNDS}; n++) {{
    phi_word high0 = phi_upper(c0, {MULTIPLIERS[0]:#x}ul);
    phi_word high1 = phi_upper(c2, {MULTIPLIERS[1]:#x}ul);
    phi_word low0 = c0 * {MULTIPLIERS[0]:#x}ul, low1 = c2 * {MULTIPLIERS[1]:#x}ul;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += {WEYL[0]:#x}ul;
    k1 += {WEYL[1]:#x}ul;
  }}
  phi_word words[4] = {{c0, c1, c2, c3}};
  size_t first = (size_t(row) * uint(BLOCKS) + block) * {NUMBERS}u;
  for (uint i = 0; i < {NUMBERS}u; i++) {{
    numbers[first + i] = phi_number(uint(words[i / 2u] >> 32 * (i % 2u)));
  }}
}}
"""


def text(source: str, place: str) -> str:
    """Fill in the expressions for a thread's position; `place` has {} for the axis."""
    for axis in "xyz":
        source = source.replace(f"PLACE_{axis}", place.format(axis))
    return source


@cache
def _kernel(label: str) -> Any:
    """Return the kernel. Those whose source MLX generates differently need different labels."""
    kind = devices.gpu_kind()
    assert kind is not None
    make = mx.fast.metal_kernel if kind == "metal" else mx.fast.cuda_kernel
    return make(
        name=f"phi_uniforms{label}",
        input_names=["key", "step"],
        output_names=["numbers"],
        source=text(UNIFORMS, PLACES[kind]),
        header=PREAMBLES[kind] + HEADER,
    )


def uniforms(key: Array, step: Array, size: int) -> Array:
    """Compute what `Backend.uniforms` describes, on the GPU."""
    rows, blocks = key.shape[0], -(-size // NUMBERS)
    # MLX passes an input of fewer than 8 elements in another kind of memory.
    label = "".join(f"_few_{n}" for n, a in (("key", key), ("step", step)) if a.size < 8)
    (found,) = _kernel(label)(
        inputs=[key, step],
        template=[("BLOCKS", blocks)],
        grid=(blocks, rows, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(rows, blocks * NUMBERS)],
        output_dtypes=[mx.float32],
    )
    return found[:, :size]


@cache
def is_usable() -> bool:
    """Return whether the kernel works here, by comparing it with the same algorithm on NumPy."""
    if devices.gpu_kind() is None:
        return False
    key = philox.keys([0, 2**64 - 1, 12_345 << 30])
    step = np.array([0, 7, 2**32 - 1], np.uint32)
    try:
        found = np.array(uniforms(mx.array(key), mx.array(step), 9_999))
    except (RuntimeError, ValueError):  # MLX raises these for a kernel that does not compile
        return False
    return found.tobytes() == philox.uniforms(np, key, step, 9_999).tobytes()
