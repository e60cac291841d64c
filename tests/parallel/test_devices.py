"""Tests that several devices sharing a model compute the logits and text of one device."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from phicore.testing.tiny_models import Q4_K_M, Tiny, Types, write_model

pytest.importorskip("jax", reason="install phicore-jax")

PROGRAM = Path(__file__).with_name("program.py")
BOUND = 5e-5  # the order of additions differs, and kernels round activations to 16 bits
TINY = Tiny(
    hidden_size=1024,
    intermediate_size=1024,
    num_attention_heads=16,
    num_key_value_heads=4,
    num_hidden_layers=2,
    vocab_size=80,
    max_position_embeddings=400,
)
MODELS: dict[str, tuple[Tiny, Types]] = {
    "phi3": (TINY, Q4_K_M),
    "window": (replace(TINY, sliding_window=6), Type.Q8_0),
    "llama": (replace(TINY, arch="llama"), Q4_K_M),
    "qwen2": (replace(TINY, arch="qwen2", tie_word_embeddings=True), Type.Q5_K),
    "phimoe": (replace(TINY, arch="phimoe", num_local_experts=3), Type.Q4_K),
}


def start(path: Path, devices: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), str(path), str(devices), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def write(folder: Path, name: str) -> Path:
    tiny, types = MODELS[name]
    return write_model(folder / "m.gguf", tiny, types, tokenizer=False)


def check(found: dict[str, Any]) -> None:
    assert found["error"] < BOUND
    for one, many in (found["texts"], found["long_texts"]):
        assert many == one


@pytest.mark.complete
@pytest.mark.parametrize(
    "name",
    [n if n == "phimoe" else pytest.param(n, marks=pytest.mark.complete) for n in MODELS],
)
def test_four_devices_compute_what_one_does(tmp_path: Path, name: str):
    found = result(start(write(tmp_path, name), 4, "--cache-type", "f32"))
    assert found["devices"] == 4
    check(found)


@pytest.mark.complete
def test_two_devices_run_several_steps_in_a_call(tmp_path: Path):
    check(result(start(write(tmp_path, "phi3"), 2, "--cache-type", "f32", "--steps", "5")))


@pytest.mark.complete
def test_each_device_holds_its_share(tmp_path: Path):
    found = result(start(write(tmp_path, "phi3"), 2))
    assert found["error"] < 1e-4  # larger, with the default cache type
    assert found["bytes_here"] < 0.51 * found["bytes"]


@pytest.mark.complete
def test_two_processes_compute_what_one_does(tmp_path: Path):
    """The processes connect to a coordinator on the loopback interface."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    path = write(tmp_path, "phi3")
    options = ("--cache-type", "f32", "--address", address)
    both = [start(path, 4, "--process", f"{number}/2", *options) for number in range(2)]
    for found in [result(process) for process in both]:
        assert found["devices"] == 4
        check(found)
