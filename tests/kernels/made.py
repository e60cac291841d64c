"""Kernels, weights and helpers that the tests of kernels share."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from phicore_jax.kernels import dense
from phicore_jax.kernels.formats import FORMATS
from phicore_jax.kernels.runtime import Kernels

from phicore.gguf.random_models import random_matrix
from phicore.gguf.reader import GGUFTensor

TYPES = (*FORMATS, *dense.ELEMENT_BYTES)
"""Every type that has kernels."""


def kernels_of(target: str, threads: int = 2) -> Kernels:
    """Return kernels of an instruction set, with a pool of their own.

    XLA knows a kernel by one name until the process ends, and that name does not include the number
    of threads. So these kernels get names of their own. They share the folder of compiled code.
    """
    return _kernels_of(target, threads)


@cache
def _kernels_of(target: str, threads: int) -> Kernels:
    kernels = Kernels(target)
    kernels.set_threads(threads)
    compiler = kernels._compiler
    compiler.folder  # noqa: B018 - it is computed from the digest, which changes next
    compiler.digest = f"{compiler.digest}-tests-{threads}"
    return kernels


def block_columns(ggml_type: Type) -> int:
    return int(GGML_QUANT_SIZES[ggml_type][0])


def from_bytes(ggml_type: Type, data: np.ndarray) -> GGUFTensor:
    """Make a tensor of rows of blocks, (N, bytes) uint8."""
    block, size = GGML_QUANT_SIZES[ggml_type]
    columns = data.shape[1] // size * block
    return GGUFTensor("w", ggml_type, (len(data), columns), np.ascontiguousarray(data))


def random_tensor(ggml_type: Type, rows: int, columns: int, rng: np.random.Generator) -> GGUFTensor:
    data = random_matrix(ggml_type, rows, columns, rng, 1.0)
    return from_bytes(ggml_type, data.view(np.uint8).reshape(rows, -1))


def values(tensor: GGUFTensor) -> np.ndarray:
    """Return the values (N, K) float32 as the gguf package reads them."""
    with np.errstate(all="ignore"):  # NaN and infinities come through
        return dequantize(tensor.data, tensor.type).reshape(tensor.shape)


def run_python(code: str, **environment: str) -> str:
    """Run a program in a process of its own and return what it prints; it must not fail."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
    return result.stdout
