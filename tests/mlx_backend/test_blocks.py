"""Tests of the GPU kernels' source text, compiled for the CPU with a C++ compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from mlx_backend.test_affine import edges, random_tensor, values
from phicore_mlx import blocks, devices

from phicore.backend import BackendOptions
from phicore.gguf.reader import GGUFTensor
from phicore.testing.compare import assert_close
from phicore.testing.tolerances import PRODUCT

PREAMBLE = """
#include <cstddef>
#include <cstring>
typedef unsigned int uint;
static inline float bits_of(uint u) { float f; std::memcpy(&f, &u, 4); return f; }
#define PHI_FUNCTION static inline
#define PHI_BITS(u) bits_of(u)
"""
# The kernels' bodies as functions, with a thread's position as arguments. The lanes run one after
# the other. Lane 0 runs last, when the sum over all lanes is complete.
MAIN = """
#define PHI_SUM(x) (total[0] += (x))
extern "C" void product_of(const float* x, const unsigned char* blocks, float* y, int ROWS,
                           int COLUMNS, uint place_y, uint place_z) {
  float total[1] = {0};
  for (uint of = 32; of > 0; of--) { PRODUCT }
}
typedef float T;
extern "C" void expansion_of(const int* ids, const unsigned char* blocks, float* values,
                             int COLUMNS, uint place_x, uint place_y) { EXPANSION }
"""


@pytest.fixture(scope="module", params=blocks.TYPES, ids=lambda t: t.name)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Compile a type's kernels as C functions; return the type and the library."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("install a C++ compiler, such as g++")
    folder = tmp_path_factory.mktemp("kernels")
    main = MAIN.replace("PRODUCT", blocks.PRODUCT).replace("EXPANSION", blocks.EXPANSION)
    source = PREAMBLE + blocks.text(blocks.HEADER + main, request.param, "place_{}", "(of - 1)")
    (folder / "kernels.cpp").write_text(source)
    # reserved words of Metal's language, which a C++ compiler would accept as names
    reserved = ("half", "device", "constant", "thread", "kernel", "fragment", "vertex", "sample")
    options = ["-std=c++14", "-O1", "-shared", "-fPIC", *(f"-D{word}=1;" for word in reserved)]
    command = [compiler, *options, "kernels.cpp", "-o", "kernels.so"]
    subprocess.run(command, cwd=folder, check=True)
    return request.param, ctypes.CDLL(str(folder / "kernels.so"))


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("kind", ["random", "edges"])
def test_expansion_gives_the_numbers_of_the_file(kind: str, compiled, rng: np.random.Generator):
    ggml_type, library = compiled
    tensor = random_tensor(ggml_type, 9, 512, rng) if kind == "random" else edges(ggml_type, rng)
    data, columns = np.ascontiguousarray(tensor.data), tensor.shape[1]
    ids = np.array([3, 0, 8], np.int32)
    found = np.zeros((3, columns), np.float32)
    for n in range(3):
        for column in range(columns + 1):  # the grid may be larger than the matrix
            library.expansion_of(address(ids), address(data), address(found), columns, column, n)
    np.testing.assert_array_equal(found, values(tensor)[ids])


def test_product_adds_up_what_the_lanes_find(compiled, rng: np.random.Generator):
    ggml_type, library = compiled
    tensor = random_tensor(ggml_type, 5, 768, rng)
    data, x = np.ascontiguousarray(tensor.data), rng.standard_normal((2, 768), np.float32)
    y = np.full((2, 5), np.nan, np.float32)
    for m in range(2):
        for row in range(8):  # the grid may be larger than the matrix
            library.product_of(address(x), address(data), address(y), 5, 768, row, m)
    assert_close(y, x.astype(np.float64) @ values(tensor).T, PRODUCT)


@pytest.mark.parametrize("kind", blocks.PREAMBLES)
@pytest.mark.parametrize("ggml_type", blocks.TYPES, ids=lambda t: t.name)
def test_text_has_no_placeholder_left(kind: str, ggml_type: Type):
    source = blocks.PREAMBLES[kind] + blocks.text(
        blocks.HEADER + blocks.PRODUCT + blocks.EXPANSION,
        ggml_type,
        blocks.PLACES[kind],
        blocks.LANES[kind],
    )
    for placeholder in ("TYPE", "BYTES", "LANE", "PLACE"):
        assert placeholder not in source
    assert blocks.LANES[kind] in source
    assert source.count("{") == source.count("}")


def test_kernels_are_used_where_they_work_alone():
    usable = [t for t in Type if blocks.is_usable(t)]
    if devices.gpu_kind() is None:
        assert usable == []
    else:
        assert set(usable) == set(blocks.TYPES)


def gpu_only() -> None:
    if devices.gpu_kind() is None:
        pytest.skip("needs a GPU that MLX can use")


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("ggml_type", blocks.TYPES, ids=lambda t: t.name)
def test_kernels_on_the_gpu_equal_the_portable_form(
    ggml_type: Type, rows: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    gpu_only()
    from phicore_mlx.backend import MlxBackend

    from phicore.gguf.matrix import Matrix

    tensor: GGUFTensor = random_tensor(ggml_type, 96, 512, rng)
    x = rng.standard_normal((rows, 512), np.float32)
    results = []
    for is_usable in (True, False):
        monkeypatch.setattr(blocks, "is_usable", lambda t, found=is_usable: found)
        ops = MlxBackend(BackendOptions(dtype="float32"))
        weight = ops.load_weight(Matrix("w", (tensor,)))
        results.append(ops.to_numpy(ops.linear(ops.asarray(x), weight)))
        assert ("blocks" in weight[0]) == is_usable
    assert_close(*results, PRODUCT)
    assert GGML_QUANT_SIZES[ggml_type][0] == 256
