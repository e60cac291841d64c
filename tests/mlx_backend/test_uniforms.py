"""Tests of the kernel that makes random numbers: its source text, compiled for the CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phicore_mlx import devices, uniforms
from phicore_mlx.blocks import PLACES

from phicore.backend import philox
from phicore.network import sampler
from phicore.testing.conformance.uniforms import seeds, steps

PREAMBLE = """
#include <cstddef>
typedef unsigned int uint;
typedef unsigned long long phi_word;
#define PHI_FUNCTION static inline
"""
# The kernel's body as a function, with a thread's position as arguments.
MAIN = """
extern "C" void numbers_of(const uint* key, const uint* step, float* numbers, uint BLOCKS,
                           uint place_x, uint place_y) { UNIFORMS }
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., np.ndarray]:
    """Return a function that makes `size` numbers for each pair of a seed and a step."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("install a C++ compiler, such as g++")
    folder: Path = tmp_path_factory.mktemp("kernels")
    main = MAIN.replace("UNIFORMS", uniforms.text(uniforms.UNIFORMS, "place_{}"))
    (folder / "kernel.cpp").write_text(PREAMBLE + uniforms.HEADER + main)
    # reserved words of Metal's language, which a C++ compiler would accept as names
    reserved = ("half", "device", "constant", "thread", "kernel", "fragment", "vertex", "sample")
    options = ["-std=c++14", "-O1", "-shared", "-fPIC", *(f"-D{word}=1;" for word in reserved)]
    command = [compiler, *options, "kernel.cpp", "-o", "kernel.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernel.so"))

    def call(rows: list[tuple[int, int]], size: int) -> np.ndarray:
        key, step = philox.keys([r[0] for r in rows]), np.array([r[1] for r in rows], np.uint32)
        blocks = -(-size // philox.NUMBERS)
        found = np.full((len(rows), blocks * philox.NUMBERS), np.nan, np.float32)
        addresses = [ctypes.c_void_p(a.ctypes.data) for a in (key, step, found)]
        for row in range(len(rows)):
            for block in range(blocks + 3):  # the grid may be larger than the blocks
                library.numbers_of(*addresses, blocks, block, row)
        return found[:, :size]

    return call


@settings(max_examples=200)
@given(
    rows=st.lists(st.tuples(seeds, steps), min_size=2, max_size=2),
    size=st.sampled_from([1, 8, 13, 203]),
)
def test_numbers_equal_numpy_bit_for_bit(
    rows: list[tuple[int, int]], size: int, made: Callable[..., np.ndarray]
):
    expected = np.stack([sampler.uniforms(seed, step, size) for seed, step in rows])
    assert made(rows, size).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", uniforms.PREAMBLES)
def test_text_has_no_placeholder_left(kind: str):
    source = uniforms.PREAMBLES[kind] + uniforms.HEADER
    source += uniforms.text(uniforms.UNIFORMS, PLACES[kind])
    assert "PLACE" not in source
    assert source.count("{") == source.count("}")


def test_kernel_is_used_where_it_works_alone():
    if devices.gpu_kind() is None:
        assert not uniforms.is_usable()
    else:
        assert uniforms.is_usable()
