"""Tests of what `--fast-prefill` promises: logits no less exact than llama.cpp's on the same file.

Everywhere, the bound is a model of llama.cpp's arithmetic on NumPy (`benchmarks/reference.py`), on
random models of several depths. Where there is llama-cpp-python, the bound is llama.cpp itself.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, make_backend
from gguf import GGMLQuantizationType as Type

import phicore
from phicore.testing import tiny_models

pytestmark = [
    pytest.mark.skipif(
        not {"jax", "numpy"} <= {*BACKENDS}, reason="install phicore-jax and phicore-numpy"
    ),
]
LLAMA_PYTHON = os.environ.get("PHICORE_LLAMA_PYTHON", sys.executable)
"""A Python that has llama-cpp-python."""
TOKENS = 80  # more than 32, so that the products are those of prompts

Write = Callable[[int, Type], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a random model of some layers; return its path."""

    def made(layers: int, data_type: Type) -> Path:
        tiny = tiny_models.Tiny(num_hidden_layers=layers)
        return tiny_models.write_model(tmp_path / f"{data_type.name}.gguf", tiny, data_type)

    return made


@pytest.fixture(autouse=True)
def _fast_prefill() -> None:
    if not make_backend("jax").capabilities.has_fast_prefill:
        pytest.skip("the JAX backend has no fast prefill on this device")


def fast_logits(path: Path, ids: list[int]) -> np.ndarray:
    with phicore.load(path, "jax", fast_prefill=True) as model:
        return model.logits(ids)


def tokens(seed: int = 0) -> list[int]:
    vocabulary = tiny_models.Tiny().vocab_size
    return np.random.default_rng(seed).integers(vocabulary, size=TOKENS).tolist()


@pytest.mark.complete
@pytest.mark.each_value("layers", "data_type")
@pytest.mark.parametrize("layers", [4, 16, 32])
@pytest.mark.parametrize("data_type", [Type.Q4_K, Type.Q6_K, Type.Q4_0, Type.Q8_0])
def test_error_is_below_that_of_llama_cpps_arithmetic(write: Write, layers: int, data_type: Type):
    reference = importlib.import_module("reference")
    path, ids = write(layers, data_type), tokens()
    with reference.opened(path, reference.Streamed()) as model:
        expected = model.logits(ids)
    with reference.opened(path, reference.LlamaArithmetic()) as model:
        theirs = reference.error(model.logits(ids), expected)
    ours = reference.error(fast_logits(path, ids), expected)
    assert 1e-4 < ours <= theirs  # a smaller error would not be the fast path's


@pytest.mark.parametrize("layers", [4, 32])
def test_error_is_below_that_of_llama_cpp(write: Write, tmp_path: Path, layers: int):
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('llama_cpp') is None)"
    if subprocess.run([LLAMA_PYTHON, "-c", code], check=False).returncode:
        pytest.skip("llama-cpp-python is not installed; PHICORE_LLAMA_PYTHON names a Python")
    reference = importlib.import_module("reference")
    worker = importlib.import_module("engines.worker")
    path, ids, found = write(layers, Type.Q4_K), tokens(), tmp_path / "logits.npy"
    with reference.opened(path, reference.Streamed()) as model:
        expected = model.logits(ids)
    options = {"model": str(path), "context": 256, "threads": 2, "flash_attn": True}
    with worker.Worker(LLAMA_PYTHON, "llama.cpp", options) as llama:
        llama.ask("save_logits", ids, str(found))
    theirs = reference.error(np.load(found), expected)
    ours = reference.error(fast_logits(path, ids), expected)
    assert ours <= theirs


@pytest.mark.parametrize(("name", "columns"), [("q8_k", 256), ("q8_0", 32)])
def test_llama_cpps_rounding_is_to_127_steps_of_the_largest(name: str, columns: int):
    """What rounding means: codes are whole, the largest is 127, and each is the nearest one."""
    rounded = getattr(importlib.import_module("reference"), name)
    x = np.random.default_rng(0).standard_normal((5, 512), np.float32)
    x[1, :columns] = 0
    groups, found = (a.reshape(5, -1, columns) for a in (x, rounded(x)))
    steps = np.abs(groups).max(axis=-1, keepdims=True) / 127
    codes = found[groups.any(axis=-1)] / steps[groups.any(axis=-1)]
    slack = 2e-3 if name == "q8_0" else 1e-4  # a float16 scale has 11 bits
    assert np.abs(codes - np.rint(codes)).max() < 127 * slack
    assert (np.abs(np.rint(codes)).max(axis=-1) == 127).all()
    assert (np.abs(found - groups) <= steps * (0.5 + 127 * slack)).all()
    assert not found[1, 0].any()
