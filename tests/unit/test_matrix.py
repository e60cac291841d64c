"""A matrix of several tensors is their rows on top of each other."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from phicore.gguf.matrix import Matrix
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
