"""Tests of compiled kernels on disk: they are found again, and compiled again if damaged."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from kernels.made import run_python
from phicore_jax.kernels import build, linear
from phicore_jax.kernels.build import Compiler
from phicore_jax.kernels.lang import Module, Target

PACK = """
import numpy as np
from gguf import GGMLQuantizationType as Type
from kernels.made import random_tensor
from phicore_jax.kernels import build, find_kernels

compiled, optimized = [], build.optimized
def count(module, *args):
    compiled.append(module)
    return optimized(module, *args)
build.optimized = count

kernels, about = find_kernels()
assert kernels, about
packed = kernels.pack([random_tensor(Type.Q4_K, 16, 256, np.random.default_rng(0))])
assert packed.strips.any()
print(len(compiled))
"""
"""A program that uses two modules (`worker` and one that packs) and prints how many it compiled."""


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*.o")}


def test_library_second_process_compiles_nothing(tmp_path: Path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    assert run_python(PACK, **environment) == "2\n"
    kept = files(tmp_path)
    assert kept.keys() == {"worker.o", "pack-Q4_K.o"}
    assert run_python(PACK, **environment) == "0\n"
    assert files(tmp_path) == kept
    assert [p.suffix for p in tmp_path.rglob("kernels/*/*")] == [".o", ".o"]  # and nothing else


FAR = """
import ctypes
from phicore_jax.kernels import build, rowwise
from phicore_jax.kernels.lang import Target

compiler = build.Compiler(Target(build.supported_targets()[0]))
compiler.library("swiglu", rowwise.emit_swiglu, ["swiglu"])
code = build.code_files.read(compiler.folder / "swiglu.o")
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

def reserve(size):  # private, anonymous, and without memory behind it
    found = libc.mmap(None, size, 0, 0x4022, -1, 0)
    assert found not in (None, ctypes.c_void_p(-1).value)
    return found

whole = reserve(800 << 30)
for size in (1 << 30, 1 << 26, 1 << 22, 1 << 18, 1 << 14, 1 << 12):
    while reserve(size) > whole:
        pass  # this fills the holes that there are
for i in range(1, 100):
    assert libc.munmap(whole + i * (8 << 30), 4096) == 0
again = build.Library(compiler._jit, "again", code, ["swiglu"])
print(again.address("swiglu") > 0)
"""
"""A program that links where the only holes lie further apart than 32 bits reach."""


@pytest.mark.skipif(sys.platform != "linux", reason="the numbers of mmap are those of Linux")
def test_parts_of_a_module_lie_together_in_any_space_of_addresses(tmp_path: Path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    assert run_python(FAR, **environment) == "True\n"


DAMAGED = """
from gguf import GGMLQuantizationType as Type
from pathlib import Path
from phicore_jax.kernels import build, linear
from phicore_jax.kernels.lang import Target

path, compiled, optimized = Path("FOLDER", "pack.o"), [], build.optimized
def count(module, *args):
    compiled.append(module)
    return optimized(module, *args)
build.optimized = count

def use():
    compiler = build.Compiler(Target("generic"))
    compiler.folder = path.parent
    library = compiler.library("pack", lambda m: linear.emit_pack(m, Type.Q8_0), ["pack"])
    assert library.address("pack")
    return library

libraries = [use()]
code = path.read_bytes()
for damaged in (
    b"",
    code[: len(code) // 2],
    code[:1000] + bytes([code[1000] ^ 1]) + code[1001:],
    bytes(len(code)),
    b"\\x7fELF" + b"never compiled" * 100,
):
    path.write_bytes(damaged)
    libraries += [use(), use()]
    assert len(path.read_bytes()) == len(code)
print(len(compiled))
"""


@pytest.mark.complete
def test_library_damaged_file_is_compiled_again(tmp_path: Path):
    """The program runs in a process of its own, since damaged code would crash the process."""
    assert run_python(DAMAGED.replace("FOLDER", str(tmp_path))) == "6\n"  # the first, and 5 damaged
    assert [path.name for path in tmp_path.iterdir()] == ["pack.o"]


@pytest.mark.complete
def test_library_without_a_folder_is_compiled_each_time(tmp_path: Path):
    """A file lies where the folder should be, so no user can write there, not even root."""
    file = tmp_path / "file"
    file.touch()
    environment = {"XDG_CACHE_HOME": str(file), "HOME": str(file)}
    assert run_python(PACK, **environment) == "2\n"
    assert run_python(PACK, **environment) == "2\n"


def test_library_is_compiled_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from gguf import GGMLQuantizationType as Type

    compiler = Compiler(Target(build.supported_targets()[0]))
    compiler.folder = tmp_path

    def emit(module: Module) -> None:
        linear.emit_pack(module, Type.Q8_0)

    first = compiler.library("pack", emit, ["pack"])
    monkeypatch.setattr(build, "optimized", None)
    shutil.rmtree(tmp_path)
    assert compiler.library("pack", emit, ["pack"]) is first


def test_digest_tells_targets_sources_and_processors_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def digest(target: str = "generic") -> str:
        return Compiler(Target(target)).digest

    targets = ["generic", *build.X86_FEATURES, "neon"]
    assert len({digest(t) for t in targets}) == len(targets)
    assert digest() == digest()

    monkeypatch.setattr(build.llvm, "get_host_cpu_name", lambda: "another")
    other_processor = digest()
    monkeypatch.undo()
    assert other_processor != digest()

    copy = tmp_path / "kernels"
    shutil.copytree(Path(build.__file__).parent, copy)
    before = digest()
    monkeypatch.setattr(build, "__file__", str(copy / "build.py"))
    assert digest() == before
    with (copy / "linear.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert digest() != before
