"""Tests of the conversion to MLX's layout: MLX and the gguf package read exactly equal values."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from phicore_mlx import affine
from phicore_mlx.affine import LAYOUTS
from phicore_mlx.backend import MlxBackend, _dequantized

from phicore.backend import BackendOptions
from phicore.gguf.blocks import BLOCKS
from phicore.gguf.matrix import Matrix
from phicore.gguf.quants import AFFINE_TYPES
from phicore.gguf.random_models import random_matrix
from phicore.gguf.reader import GGUFTensor

LARGEST, SMALLEST_NORMAL, SMALLEST = 65504.0, 2.0**-14, 2.0**-24
ENDS = [0.0, 1.0, 0.37, LARGEST, SMALLEST_NORMAL, SMALLEST, 1023 * SMALLEST]
ENDS = np.array([*ENDS, *(-x for x in ENDS)], "<f2")

each_type = pytest.mark.parametrize("ggml_type", LAYOUTS, ids=lambda t: t.name)


def tensor_of(ggml_type: Type, data: np.ndarray) -> GGUFTensor:
    block, size = GGML_QUANT_SIZES[ggml_type]
    return GGUFTensor("w", ggml_type, (len(data), data.shape[1] // size * block), data)


def edges(ggml_type: Type, rng: np.random.Generator) -> GGUFTensor:
    """Make blocks of bits 0, bits 1 and random bits, with every pair of `ENDS` as d and dmin."""
    size = GGML_QUANT_SIZES[ggml_type][1]
    pairs = [half.ravel() for half in np.meshgrid(ENDS, ENDS)]
    blocks = np.zeros((4, len(pairs[0]), size), np.uint8)
    blocks[1], blocks[2:] = 255, rng.integers(256, size=blocks[2:].shape)
    for field, half in zip((BLOCKS[ggml_type].d, BLOCKS[ggml_type].dmin), pairs, strict=True):
        field.of(blocks)[...] = half.view(np.uint8).reshape(-1, 2)[:, : field.size]
    return tensor_of(ggml_type, blocks.reshape(-1, 4 * size))


def random_tensor(ggml_type: Type, rows: int, columns: int, rng: np.random.Generator) -> GGUFTensor:
    data = random_matrix(ggml_type, rows, columns, rng, 1.0)
    return tensor_of(ggml_type, data.view(np.uint8).reshape(rows, -1))


def values(tensor: GGUFTensor) -> np.ndarray:
    return dequantize(tensor.data, tensor.type)


def test_every_affine_type_has_a_layout():
    assert set(LAYOUTS) == set(AFFINE_TYPES)


@each_type
@pytest.mark.parametrize("kind", ["random", "edges"])
def test_mlx_reads_the_numbers_of_the_file(kind: str, ggml_type: Type, rng: np.random.Generator):
    make = {"random": lambda t, rng: random_tensor(t, 70, 512, rng), "edges": edges}[kind]
    tensor = make(ggml_type, rng)
    arrays, layout = affine.transcode([tensor]), LAYOUTS[ggml_type]
    on_mlx = _dequantized({name: mx.array(a) for name, a in arrays.items()}, layout)
    np.testing.assert_array_equal(np.array(on_mlx), values(tensor))
    np.testing.assert_array_equal(affine.dequantized(arrays, layout), values(tensor))


@each_type
def test_transcode_stacks_tensors_and_tiles(
    ggml_type: Type, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(affine, "TILE_CODES", 2 * 256)
    tensors = [random_tensor(ggml_type, rows, 256, rng) for rows in (3, 1, 8)]
    found = affine.dequantized(affine.transcode(tensors), LAYOUTS[ggml_type])
    np.testing.assert_array_equal(found, np.concatenate([values(t) for t in tensors]))


@each_type
def test_bits_per_weight_are_those_in_memory(ggml_type: Type, rng: np.random.Generator):
    arrays = affine.transcode([random_tensor(ggml_type, 8, 512, rng)])
    size = sum(array.nbytes for array in arrays.values())
    assert LAYOUTS[ggml_type].bits_per_weight == 8 * size / (8 * 512)


@each_type
def test_compact_scales_cost_what_the_documentation_says(ggml_type: Type, rng: np.random.Generator):
    ops = MlxBackend(BackendOptions(device="cpu", compact=True))
    tensor = random_tensor(ggml_type, 64, 2048, rng)
    rows = ops.to_numpy(
        ops.embedding(mx.arange(64)[None], ops.load_weight(Matrix("w", (tensor,))))
    )[0]
    expected = values(tensor)
    error = np.linalg.norm(rows - expected) / np.linalg.norm(expected)
    has_halves = ggml_type not in (Type.Q2_K, Type.Q4_K, Type.Q5_K, Type.Q6_K)
    if has_halves:  # the scales are float16 in the file; only a bias such as -16 * d is rounded
        assert error < 1e-7
    else:
        assert 5e-5 < error < 4e-4


def test_documented_table_is_that_of_the_layouts():
    text = (Path(__file__).parents[2] / "docs" / "mlx.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    found = {
        name: float(row[2])
        for row in rows
        if len(row) == 6 and "_" in row[0]
        for name in row[0].split(", ")
    }
    assert found == {t.name: layout.bits_per_weight for t, layout in LAYOUTS.items()}


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 3), st.integers(1, 4), st.data())
def test_packed_codes_are_one_stream_of_bits(bits: int, rows: int, groups: int, data):
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(2**bits, size=(rows, 32 * groups), dtype=np.uint8)
    words = affine.packed(codes, bits)
    stream = np.unpackbits(codes[..., None], axis=2, bitorder="little")[:, :, :bits]
    expected = np.packbits(stream.reshape(rows, -1), axis=1, bitorder="little")
    assert np.array_equal(words.view(np.uint8), expected)
    assert np.array_equal(affine.unpacked(words, bits), codes)
