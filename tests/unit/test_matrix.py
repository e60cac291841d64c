"""Tests of `Matrix`, which stacks the rows of several tensors."""

import re

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from phicore.errors import BackendError
from phicore.gguf.matrix import Matrix, Split
from phicore.gguf.random_models import random_matrix
from phicore.gguf.reader import GGUFTensor


def tensor(data_type: Type, rows: int, cols: int, seed: int) -> tuple[GGUFTensor, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    data = gguf.quants.quantize(x, data_type)
    values = gguf.quants.dequantize(data, data_type)
    return GGUFTensor("w", data_type, (rows, cols), data.view(np.uint8)), values


def test_matrix_one_part_is_the_tensor():
    part, values = tensor(Type.Q4_0, 3, 64, 0)
    matrix = Matrix("m", (part,))
    assert matrix.shape == (3, 64)
    assert np.array_equal(matrix.dequantize(), values)


def test_matrix_parts_of_different_types_keep_their_order():
    pairs = [tensor(t, n, 96, n) for t, n in ((Type.Q8_0, 2), (Type.F16, 5), (Type.Q4_1, 1))]
    matrix = Matrix("m", tuple(part for part, _ in pairs))
    assert matrix.shape == (8, 96)
    values = matrix.dequantize()
    assert values.dtype == np.float32
    assert np.array_equal(values, np.concatenate([v for _, v in pairs]))


def test_matrix_dequantized_values_are_a_copy():
    part, values = tensor(Type.F32, 2, 4, 0)
    part.data.flags.writeable = False
    matrix = Matrix("m", (part,))
    matrix.dequantize()[:] = 0
    assert np.array_equal(matrix.dequantize(), values)


# ---- shares ----------------------------------------------------------------------------------


def mixed(split: Split) -> Matrix:
    """Make a matrix of three parts with 8, 4 and 12 rows of 512 columns, each of another type."""
    rng = np.random.Generator(np.random.PCG64(1))
    parts = []
    for ggml_type, rows in ((Type.Q4_K, 8), (Type.Q6_K, 4), (Type.F16, 12)):
        data = random_matrix(ggml_type, rows, 512, rng, 0.1)
        parts.append(GGUFTensor("part", ggml_type, (rows, 512), data.view(np.uint8)))
    return Matrix("whole", tuple(parts), split)


@pytest.mark.parametrize(
    ("sections", "count"), [((24,), 2), ((24,), 3), ((12, 12), 4), ((6, 18), 2), ((4, 4, 16), 4)]
)
def test_shares_of_rows_are_those_of_each_section(sections: tuple[int, ...], count: int):
    matrix = mixed(Split(sections))
    values, start = matrix.dequantize(), 0
    expected: list[list[np.ndarray]] = [[] for _ in range(count)]
    for rows in sections:
        for own, part in zip(expected, np.split(values[start : start + rows], count), strict=True):
            own.append(part)
        start += rows
    for device in range(count):
        share = matrix.share(device, count)
        assert np.array_equal(share.dequantize(), np.concatenate(expected[device]))
        assert share.shape == (24 // count, 512)


def test_shares_of_columns_are_whole_blocks():
    matrix = mixed(Split())
    shares = [matrix.share(device, 2) for device in range(2)]
    assert [share.shape for share in shares] == [(24, 256)] * 2
    values = np.concatenate([share.dequantize() for share in shares], axis=1)
    assert np.array_equal(values, matrix.dequantize())


def test_what_is_not_split_is_whole_on_each_device():
    matrix = mixed(Split())
    assert Matrix("whole", matrix.parts).share(1, 2).parts == matrix.parts


@pytest.mark.parametrize(
    ("split", "count", "told"),
    [
        (Split((24,)), 5, "whole: its 24 rows cannot be shared by 5 devices; take fewer"),
        (Split(), 4, "whole: its 2 blocks of Q4_K in a row cannot be shared by 4 devices"),
    ],
)
def test_shares_that_would_not_be_whole_are_refused(split: Split, count: int, told: str):
    with pytest.raises(BackendError, match=re.escape(told)):
        mixed(split).share(0, count)
