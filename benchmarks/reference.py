"""Logits to measure errors by: float32 on NumPy, and a model of llama.cpp's arithmetic.

Both hold the weights as codes and expand a few rows at a time, so they need little more memory than
the file has bytes, where NumPy's backend needs four bytes for each weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type
from phicore_numpy.backend import NumpyBackend

from phicore.backend import Array, Weight
from phicore.gguf.matrix import Matrix
from phicore.gguf.reader import GGUFTensor
from phicore.model import Model
from phicore.progress import silent
from phicore.sources import resolve

ROWS_BYTES = 2**26  # of float32 values that are expanded at a time
K_TYPES = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K)
DENSE_TYPES = (Type.F32, Type.F16, Type.BF16)
K_COLUMNS, COLUMNS = 256, 32


class Streamed(NumpyBackend):
    """NumPy in float32, with weights that are expanded when they are used.

    A weight is the tuple of a matrix' parts, as in the file. Experts are dense, as on NumPy.
    """

    def load_weight(self, matrix: Matrix) -> Weight:
        return tuple(replace(part, data=np.array(part.data)) for part in matrix.parts)

    def linear(self, x: Array, weight: Weight) -> Array:
        flat = x.reshape(-1, x.shape[-1])
        columns = []
        for part in weight:
            rounded = self.rounded(flat, part.type)
            columns += [rounded @ values.T for values in _parts(part)]
        return np.concatenate(columns, axis=1).reshape(*x.shape[:-1], -1)

    def embedding(self, ids: Array, weight: Weight) -> Array:
        [part] = weight
        rows = ids.reshape(-1)
        chosen = replace(part, shape=(len(rows), part.shape[1]), data=part.data[rows])
        return chosen.dequantize().reshape(*ids.shape, -1)

    def rounded(self, x: np.ndarray, weight_type: Type) -> np.ndarray:
        """Return the activations (M, K) that are multiplied with a weight of a type."""
        return x


class LlamaArithmetic(Streamed):
    """The same network with activations rounded to 8 bits as llama.cpp rounds them on a CPU.

    Products with the rounded activations are float32, as exact as llama.cpp's integers. What else
    llama.cpp rounds is left out: keys, values and probabilities in float16, and sums of `q8_1`. So
    this model's errors are slightly smaller than llama.cpp's, and a bound on phicore's fast path
    that is tighter than "not worse than llama.cpp".

    Source: ggml-quants.c, `quantize_row_q8_K_ref` and `quantize_row_q8_0_ref`; ggml-cpu.c,
    `type_traits_cpu[].vec_dot_type`.
    """

    def rounded(self, x: np.ndarray, weight_type: Type) -> np.ndarray:
        if weight_type in DENSE_TYPES:
            kept = {Type.F16: np.float16}.get(weight_type, np.float32)
            return x.astype(kept).astype(np.float32)
        return q8_k(x) if weight_type in K_TYPES else q8_0(x)


def q8_k(x: np.ndarray) -> np.ndarray:
    """Round rows of (M, K) to multiples of 1/127 of the largest of 256 columns."""
    groups = x.reshape(len(x), -1, K_COLUMNS)
    where = np.abs(groups).argmax(axis=-1, keepdims=True)
    largest = np.take_along_axis(groups, where, axis=-1)
    inverse = np.divide(np.float32(-127), largest, out=np.zeros_like(largest), where=largest != 0)
    codes = np.minimum(np.rint(inverse * groups), 127)
    scales = np.divide(np.float32(1), inverse, out=np.zeros_like(inverse), where=inverse != 0)
    return (codes * scales).reshape(x.shape)


def q8_0(x: np.ndarray) -> np.ndarray:
    """Round rows of (M, K) to multiples of a float16, 1/127 of the largest of 32 columns."""
    groups = x.reshape(len(x), -1, COLUMNS)
    scales = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.trunc(groups * inverse + np.copysign(np.float32(0.5), groups))  # roundf
    return (codes * scales.astype(np.float16).astype(np.float32)).reshape(x.shape)


def opened(path: Path, ops: NumpyBackend) -> Model:
    """Load a file with a backend of this module. The model is a context manager.

    Raises:
        PhicoreError: If the file cannot be loaded.
    """
    files = resolve(str(path))
    return Model(files, ops, backend="numpy", context=None, progress=silent, prefix_cache_bytes=0)


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative error: the norm of the difference over the norm of what is expected."""
    difference = found.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def median_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the median over all positions of the relative error of a position's logits.

    A trained network can be unstable at a position: a rounding decides there whether a large
    activation appears, and the error of this position is then larger than that of all others
    together. So `error` can say more about one position than about the arithmetic.
    """
    return float(np.median([error(a, b) for a, b in zip(found, expected, strict=True)]))


def _parts(tensor: GGUFTensor) -> Iterator[np.ndarray]:
    """Yield the values of some rows at a time."""
    count = max(ROWS_BYTES // (4 * tensor.shape[1]), 1)
    for start in range(0, tensor.shape[0], count):
        data = tensor.data[start : start + count]
        yield replace(tensor, shape=(len(data), tensor.shape[1]), data=data).dequantize()
