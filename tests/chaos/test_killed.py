"""Whole programs that are killed at random moments, with all their caches, and started again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phicore.testing.tiny_models import Q4_K_M, Tiny, write_model

TRIES = int(os.environ.get("PHICORE_CHAOS_TRIES", "3"))
SEED = int(os.environ.get("PHICORE_CHAOS_SEED", "1"))
REQUESTS = [{"id": f"ü{i}", "prompt": "Hi", "seed": i, "max_tokens": 60} for i in range(24)]

pytestmark = [
    pytest.mark.complete,
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("killed") / "tiny.gguf", Tiny(), Q4_K_M)


class Program:
    """A command whose caches are in a folder of its own."""

    def __init__(self, home: Path, *arguments: object) -> None:
        self.command = [sys.executable, "-m", "phicore", *map(str, arguments)]
        caches = {"XDG_CACHE_HOME": str(home), "PHICORE_PACKED_CACHE": "1GB"}
        self.environment = {**os.environ, **caches}
        self.environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def killed_after(self, seconds: float) -> bool:
        """Start the program, and kill it after this time; return whether it was still running."""
        process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        return False

    def run(self) -> tuple[str, float]:
        """Run the program to its end; return what it prints, and how long it took."""
        started = time.monotonic()
        done = subprocess.run(
            self.command, env=self.environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr
        return done.stdout, time.monotonic() - started


def test_first_start_that_is_killed_at_any_time(tiny: Path, tmp_path: Path):
    """Kernels, programs, packed weights and JAX's cache are written when a model is first used."""
    options = ["generate", "-m", tiny, "-b", "jax", "-n", 20, "--seed", 1, "Hi"]
    expected, took_s = Program(tmp_path / "whole", *options).run()
    rng, killed = random.Random(SEED), 0
    for number in range(TRIES):
        program = Program(tmp_path / str(number), *options)
        killed += program.killed_after(rng.uniform(0.1, 0.95) * took_s)
        assert program.run()[0] == expected
    print(f"\n{killed} of {TRIES} starts were killed, in {took_s:.1f} s")
    assert killed >= TRIES // 3


def test_batch_that_is_killed_again_and_again_loses_no_answer(tiny: Path, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, REQUESTS)))
    options = ["generate", "-m", tiny, "-b", "numpy", "--batch", tmp_path / "in.jsonl"]
    _, took_s = Program(tmp_path, *options, "--out", tmp_path / "whole.jsonl").run()
    expected = set((tmp_path / "whole.jsonl").read_text("utf-8").splitlines())
    rng, killed = random.Random(SEED), 0
    for number in range(TRIES):
        out = tmp_path / f"{number}.jsonl"
        program, kept = Program(tmp_path, *options, "--out", out), list[str]()
        for _ in range(3):
            killed += program.killed_after(rng.uniform(0.2, 0.8) * took_s)
            data = out.read_bytes() if out.exists() else b""
            lines = data.decode("utf-8", "ignore").split("\n")[:-1]
            assert lines[: len(kept)] == kept
            kept = lines
        program.run()
        lines = out.read_text("utf-8").splitlines()
        assert lines[: len(kept)] == kept
        assert len(lines) == len(REQUESTS)
        assert set(lines) == expected
    print(f"\n{killed} of {3 * TRIES} runs were killed, in {took_s:.1f} s")
    assert killed >= TRIES
