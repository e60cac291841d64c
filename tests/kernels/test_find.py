"""Tests of finding kernels: which are found, and the reason given when there are none."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from api.tiny_models import write_tiny
from kernels.made import run_python
from phicore_jax.kernels import build, ffi, find_kernels, runtime

import phicore

find = find_kernels.__wrapped__  # the function without its cache


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PHICORE_KERNELS", "PHICORE_CPU", "PHICORE_THREADS"):
        monkeypatch.delenv(name, raising=False)


def test_installed_interface_of_xla_is_known():
    assert ffi.interface_version() in ffi.KNOWN


def test_find_kernels_takes_the_best_target_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PHICORE_THREADS", "3")
    kernels, about = find()
    assert kernels is not None
    assert about == f"{build.supported_targets()[0]}, threads: 3"


@pytest.mark.parametrize("target", build.supported_targets())
def test_find_kernels_takes_the_target_asked_for(target: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PHICORE_CPU", target)
    kernels, about = find()
    assert kernels is not None
    assert about.startswith(f"{target}, threads: ")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("PHICORE_KERNELS", "0", "switched off by PHICORE_KERNELS=0"),
        (
            "PHICORE_CPU",
            "z80",
            f"PHICORE_CPU=z80: this processor has {', '.join(build.supported_targets())}",
        ),
    ],
)
def test_find_kernels_environment_that_gives_none(
    name: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(name, value)
    assert find() == (None, reason)


@pytest.mark.parametrize(
    ("version", "found"), [((0, 2), "0.2"), ((0, 99), "0.99"), ((1, 3), "1.3"), (None, "unknown")]
)
def test_find_kernels_another_interface_gives_none(
    version: tuple[int, int] | None, found: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ffi, "interface_version", lambda: version)
    kernels, reason = find()
    assert kernels is None
    assert reason.endswith(f"({found})")
    assert "XLA" in reason


def test_interface_without_its_header_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    assert ffi.interface_version() is None
    header = tmp_path / "xla" / "ffi" / "api" / "c_api.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define XLA_FFI_API_MAJOR 7\n")
    assert ffi.interface_version() is None
    header.write_text("#define XLA_FFI_API_MAJOR 7\n#define XLA_FFI_API_MINOR 12\n")
    assert ffi.interface_version() == (7, 12)


@pytest.mark.parametrize("error", [RuntimeError("no such thing\nmore"), OSError("no such thing")])
def test_find_kernels_when_llvm_fails_gives_none(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(target: str) -> None:
        raise error

    monkeypatch.setattr(runtime, "Kernels", fail)
    assert find() == (None, "LLVM: no such thing")


WITHOUT = """
import sys
sys.modules["llvmlite"] = None
sys.argv = ["phicore", *ARGUMENTS]
from phicore.__main__ import main
main()
"""


@pytest.mark.complete
def test_program_without_llvmlite_says_so_and_generates(tmp_path: Path):
    reason = "no CPU kernels, XLA alone (llvmlite cannot be imported; install llvmlite)"
    wide = {"COLUMNS": "200"}
    assert reason in run_python(WITHOUT.replace("ARGUMENTS", "['backends']"), **wide)
    model = write_tiny(tmp_path / "tiny.gguf")
    options = [
        "generate",
        "-m",
        str(model),
        "-b",
        "jax",
        "-t",
        "0",
        "-n",
        "8",
        "--no-stats",
        "Hello",
    ]
    text = run_python(WITHOUT.replace("ARGUMENTS", repr(options)), **wide)
    with phicore.load(model, backend="numpy") as numpy:
        expected = numpy.generate("Hello", max_tokens=8, temperature=0).text()
    assert text.strip() == expected.strip()


def test_kernels_that_are_passed_over_are_told_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    missing = {"avx512vnni": ["avx512f", "avx512vnni"], "avxvnni": [], "avx2": []}
    monkeypatch.setattr(build, "lacking", lambda name: missing[name])
    monkeypatch.setattr(build, "supported_targets", lambda: ["avxvnni", "avx2", "generic"])
    assert build.passed_over("avx512vnni") == ""
    assert build.passed_over("avx2") == (
        "not avx512vnni: the processor lacks avx512f avx512vnni; not avxvnni: PHICORE_CPU=avx2"
    )
    monkeypatch.setattr(build, "supported_targets", lambda: ["neon", "generic"])
    assert build.passed_over("neon") == ""
