"""Tests of packing and reading rows: the numbers equal those that the gguf package reads."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from kernels.made import TYPES, block_columns, from_bytes, kernels_of, random_tensor, values
from phicore_jax.kernels.formats import FORMATS
from phicore_jax.kernels.runtime import Kernels

from phicore.gguf.blocks import BLOCKS
from phicore.gguf.reader import GGUFTensor

ROWS = (1, 15, 16, 17, 40)
STACKED = (32, 16, 7)

LARGEST, SMALLEST_NORMAL, SMALLEST = 65504.0, 2.0**-14, 2.0**-24
HALVES = np.array(
    [
        *(0.0, -0.0, 1.0, -0.37, LARGEST, -LARGEST, SMALLEST_NORMAL, -SMALLEST_NORMAL),
        *(SMALLEST, -SMALLEST, 1023 * SMALLEST, -1023 * SMALLEST, np.inf, -np.inf, np.nan),
    ],
    "<f2",
)


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    """Assert that bits are equal, except for the signs of zeros and the bits of NaN."""
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)


def every_number(ggml_type: Type) -> GGUFTensor:
    """Return a tensor of all 16-bit patterns; in float32, 16 zero bits follow each of them."""
    words = np.arange(65536, dtype="<u2").reshape(-1, 64)
    if ggml_type == Type.F32:
        words = (words.astype("<u4") << 16).view("<u2")
    return from_bytes(ggml_type, words.view(np.uint8))


def edges(ggml_type: Type, rng: np.random.Generator) -> GGUFTensor:
    """Return blocks of three kinds (bits 0, bits 1, random) with each pair of HALVES as d, dmin."""
    if ggml_type not in FORMATS:
        return every_number(ggml_type)
    block = BLOCKS[ggml_type]
    first, second = (h.ravel() for h in np.meshgrid(HALVES, HALVES))
    blocks = np.zeros((3, len(first), block.size), np.uint8)
    blocks[1], blocks[2] = 255, rng.integers(256, size=blocks[2].shape)
    for field, half in ((block.d, first), (block.dmin, second)):
        field.of(blocks)[...] = half.view(np.uint8).reshape(-1, 2)[:, : field.size]
    return from_bytes(ggml_type, blocks.reshape(-1, 3 * block.size))


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_rows_of_packed_weights_equal_the_files(
    target: str, ggml_type: Type, rng: np.random.Generator
):
    """The kernels run on XLA's own thread, where subnormal float32 numbers count as zero."""
    kernels = kernels_of(target, threads=1)
    columns = 3 * block_columns(ggml_type)
    matrices = [[random_tensor(ggml_type, n, columns, rng)] for n in ROWS]
    matrices.append([random_tensor(ggml_type, n, columns, rng) for n in STACKED])
    matrices.append([edges(ggml_type, rng)])
    expected = [np.concatenate([values(t) for t in tensors]) for tensors in matrices]
    ids = [rng.permutation(len(e)).astype(np.int32) for e in expected]

    packed = [kernels.pack(tensors) for tensors in matrices]
    found = jax.jit(lambda ids, ws: list(map(kernels.rows, ids, ws)))(ids, packed)

    for rows, order, e, p in zip(found, ids, expected, packed, strict=True):
        assert (p.rows, p.columns) == e.shape
        assert len(p.strips) == -(-len(e) // 16)
        assert_same(np.asarray(rows), e[order])


@pytest.mark.parametrize("ggml_type", [Type.Q5_K, Type.F16], ids=lambda t: t.name)
def test_rows_of_ids_that_do_not_exist_are_rows_that_do(
    kernels: Kernels, ggml_type: Type, rng: np.random.Generator
):
    """A negative id gives the first row; a too large one reads no memory beyond the matrix."""
    tensor = random_tensor(ggml_type, 40, 256, rng)
    ids = np.array([-1, -(2**31), 40, 47, 48, 1000, 2**31 - 1], np.int32)
    found = np.asarray(jax.jit(kernels.rows)(ids, kernels.pack([tensor])))
    expected = values(tensor)
    assert_same(found[:2], expected[[0, 0]])
    assert_same(found[2:4], expected[[-1, -1]])
    for row in found[4:]:
        assert (row == expected).all(axis=1).any()
