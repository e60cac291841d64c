"""Tests that the affine form of quantized blocks equals `gguf.quants.dequantize` bit for bit."""

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from phicore.gguf.quants import AFFINE_TYPES, affine, is_affine

BLOCKS = 4096


def assert_same_bits(data_type: Type, data: np.ndarray) -> None:
    actual = affine(data_type, data).dequantize()  # NumPy's warnings are errors in the tests
    with np.errstate(all="ignore"):  # random bytes can be NaN or infinity
        expected = gguf.quants.dequantize(data, data_type)
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    same = actual.view(np.uint32) == expected.view(np.uint32)
    assert (same | (np.isnan(actual) & np.isnan(expected))).all()


def data_of(data_type: Type, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    size = GGML_QUANT_SIZES[data_type][1]
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), np.uint8)


@pytest.mark.parametrize("data_type", AFFINE_TYPES, ids=lambda t: t.name)
def test_affine_random_bytes_equal_gguf(data_type: Type):
    assert_same_bits(data_type, data_of(data_type, BLOCKS // 4, 4))


@pytest.mark.parametrize("data_type", AFFINE_TYPES, ids=lambda t: t.name)
def test_affine_edge_blocks_equal_gguf(data_type: Type):
    """Every field takes its least and greatest values.

    The blocks have all bits clear, all bits set, a single byte set, or a single byte clear.
    """
    size = GGML_QUANT_SIZES[data_type][1]
    alone = np.eye(size, dtype=np.uint8) * np.uint8(255)
    ends = np.stack([np.zeros(size, np.uint8), np.full(size, 255, np.uint8)])
    scaled = np.full((size, size), 0x3C, np.uint8)  # float16 scales are 1.06, wherever they are
    scaled[np.diag_indices(size)] = 255
    assert_same_bits(data_type, np.concatenate([ends, alone, ~alone, scaled]))


@pytest.mark.parametrize("data_type", AFFINE_TYPES, ids=lambda t: t.name)
def test_affine_describes_groups_and_codes(data_type: Type):
    a = affine(data_type, data_of(data_type, 3, 2))
    block = GGML_QUANT_SIZES[data_type][0]
    assert a.codes.shape == (3, 2 * block)
    assert a.codes.dtype == np.uint8
    assert a.codes.max() < 2**a.bits
    assert a.group_size in (16, 32)
    assert a.scales.shape == (3, 2 * block // a.group_size)
    assert a.scales.dtype == np.float32
    if a.biases is not None:
        assert a.offset == 0
        assert (a.biases.shape, a.biases.dtype) == (a.scales.shape, np.float32)


@pytest.mark.parametrize("data_type", AFFINE_TYPES, ids=lambda t: t.name)
def test_affine_read_only_data_is_not_changed(data_type: Type):
    data = data_of(data_type, 2, 2)
    before = data.copy()
    data.flags.writeable = False
    affine(data_type, data)
    assert np.array_equal(data, before)


def test_is_affine_tells_the_types_apart():
    assert all(is_affine(t) for t in AFFINE_TYPES)
    assert len(set(AFFINE_TYPES)) == len(AFFINE_TYPES) == 10
    others = (Type.F32, Type.F16, Type.BF16, Type.Q8_1, Type.Q8_K, Type.IQ4_NL, Type.TQ1_0)
    assert not any(is_affine(t) for t in others)
