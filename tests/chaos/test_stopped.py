"""Programs that are stopped at every point at which they write, and disks that are full there.

Each test visits every call of the system that changes something in the folder of a piece of work
(see `driver.py`): there the process is killed, or half of a write is stored and it is killed, or
the disk is full or read-only from there on. Afterwards nothing half-written may be read, nothing
that was done may be lost, the work must succeed when it is done again, and nothing else is left.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from sources.hub_server import Hub, Repository, serve

HERE = Path(__file__).parent
ACTS = ("kill", "half", "full", "readonly")
LEAST = {"Session": 6, "Talk": 14, "Packed": 6, "Code": 10, "Synthetic": 10, "Batch": 6}
"""The least number of points that the work of a victim has: fewer mean that some are not seen."""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="the calls of the system are counted by a library in C for Linux",
)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stops") / "stops.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", path, HERE / "stops.c", "-ldl"]
    subprocess.run(command, check=True)
    return path


def visit(
    library: Path, victim: str, act: str, home: Path, every: int = 1, **environment: str
) -> int:
    """Let `driver.py` visit every n-th point; return the number of points."""
    done = subprocess.run(
        [sys.executable, HERE / "driver.py", victim, act, home, str(every)],
        env={
            **os.environ,
            "LD_PRELOAD": str(library),
            "PYTHONPATH": str(HERE.parent),
            "OPENBLAS_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    return found["points"]


@pytest.mark.each_value("victim", "act")
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("victim", LEAST)
def test_work_that_is_stopped_at_any_point(library: Path, victim: str, act: str, tmp_path: Path):
    assert visit(library, victim, act, tmp_path) >= LEAST[victim]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    model = np.random.default_rng(1).bytes(300_000)
    (tmp_path / "model.gguf").write_bytes(model)
    files = {"model.gguf": model, "tokenizer.json": b'{"version": "1.0"}'}
    with serve(Hub({"owner/repo": Repository(files)})) as found:
        yield found


@pytest.mark.complete
@pytest.mark.parametrize("act", ACTS)
def test_download_that_is_stopped_at_any_point(library: Path, act: str, hub: Hub, tmp_path: Path):
    hf = {"HF_HOME": str(tmp_path / "work" / "hf"), "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1"}
    assert visit(library, "Download", act, tmp_path, 9, **hf) >= 10
