"""Tests of `benchmarks/gpu.py` on a CPU: it runs to its end and reports failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="install phicore-jax")

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), "--model", "tiny", "--out", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.complete
def test_sections_are_measured_and_written(tmp_path: Path):
    sections = (
        *("about", "bandwidth", "load", "decode", "generate", "prompts", "logits", "attention"),
        *("products", "memory"),
    )
    done = run(tmp_path, "--device", "cpu", "--sections", ",".join(sections))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failed"] == {}
    assert [*found["seconds"]] == [*sections]
    assert found["logits"]["prefill"] < 1e-4
    assert all(row["error"] < 1e-4 for row in found["products"])
    assert {(d["batch"], d["position"]) for d in found["decode"]} == {
        (batch, position) for batch in (1, 4, 8) for position in (64, 200)
    }
    assert all(row["tokens_per_s"] > 0 for row in found["decode"] + found["generate"])
    tables = (tmp_path / "gpu.md").read_text()
    assert done.stdout.strip() == tables.strip()
    assert "| decode at position |" in tables


def test_section_that_fails_does_not_stop_the_rest(tmp_path: Path):
    done = run(tmp_path, "--device", "cpu", "--sections", "nonsense,about")
    assert done.returncode == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "nonsense" in found["failed"]
    assert found["about"]["device"] == "cpu"
    assert "nonsense failed: " in done.stdout


def test_machine_without_a_card_is_told_so(tmp_path: Path):
    import jax

    if any(device.platform != "cpu" for device in jax.local_devices()):
        pytest.skip("this machine has a GPU")
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "gpu: JAX finds no GPU here; --device cpu tries the program\n"


def test_device_that_is_not_there_is_told_in_a_line(tmp_path: Path):
    done = run(tmp_path, "--device", "cuda:99")
    assert done.returncode == 1
    assert done.stderr.startswith("gpu: backend jax: no device 'cuda:99'")
    assert done.stderr.count("\n") == 1


def test_package_that_is_missing_is_told_in_a_line(tmp_path: Path):
    (tmp_path / "gguf.py").write_text("raise ImportError('no such package', name='gguf')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(PROGRAM), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu: gguf cannot be imported; install it")
    assert done.stderr.count("\n") == 1
