"""Reference versions of the protocol's operations, in float64 NumPy and plain loops.

They were written from the protocol's docstrings, not from its default operations.
"""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from phicore.gguf.matrix import Matrix
from phicore.gguf.random_models import random_matrix
from phicore.gguf.reader import GGUFTensor


def matrix(types: list[Type], rows: list[int], cols: int, rng: np.random.Generator) -> Matrix:
    """Make a random matrix with one part for each type."""
    parts = []
    for data_type, n in zip(types, rows, strict=True):
        data = random_matrix(data_type, n, cols, rng, 1.0)
        parts.append(GGUFTensor("w", data_type, (n, cols), data.view(np.uint8).reshape(n, -1)))
    return Matrix("w", tuple(parts))


def values(weight: Matrix) -> np.ndarray:
    """Expand all values of a matrix with the gguf package, in float64."""
    return np.concatenate(
        [gguf.quants.dequantize(part.data, part.type).reshape(part.shape) for part in weight.parts]
    ).astype(np.float64)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return weight * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64) - x.astype(np.float64).mean(axis=-1, keepdims=True)
    return rms_norm(x, weight, eps) + bias


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate each pair (channel r, channel r + R), a complex number, by a factor cos + i sin."""
    out = x.astype(np.float64)
    r = cos.shape[-1]
    pairs = out[..., :r] + 1j * out[..., r : 2 * r]
    turned = pairs * (cos.astype(np.float64) + 1j * sin)[:, :, None, :]
    out[..., :r], out[..., r : 2 * r] = turned.real, turned.imag
    return out


def swiglu(gate_up: np.ndarray) -> np.ndarray:
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    return gate * 0.5 * (1 + np.tanh(gate / 2)) * up


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    scale: float,
    window: int | None,
) -> np.ndarray:
    """Compute attention for one query head and token at a time, over the positions it sees."""
    batch, heads, tokens, dim = q.shape
    group = heads // k.shape[1]
    out = np.zeros((batch, heads, tokens, dim))
    for b, h, t in np.ndindex(batch, heads, tokens):
        i = int(positions[b, t])
        seen = slice(0 if window is None else max(0, i - window + 1), i + 1)
        keys = k[b, h // group, seen].astype(np.float64)
        scores = keys @ q[b, h, t].astype(np.float64) * scale
        weights = np.exp(scores - scores.max())
        out[b, h, t] = weights / weights.sum() @ v[b, h // group, seen]
    return out
