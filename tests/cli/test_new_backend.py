"""Tests of `phicore new-backend`, which writes a plugin that works at once."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def written(phicore: Callable, tmp_path: Path) -> Path:
    result = phicore("new-backend", "abacus_2", "--into", tmp_path)
    assert result.code == 0
    folder = tmp_path / "phicore-abacus_2"
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    assert sorted(map(Path, result.out.splitlines())) == paths
    return folder


def run(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder as if the distribution in it were installed."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["phicore"]
    lines = [f"{name} = {module}" for name, module in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[phicore]", *lines]))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.complete
def test_new_backend_passes_its_own_tests(written: Path):
    done = run(written, "-m", "pytest", "-q", "-k", "not sampling and not two_models")
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout


def test_new_backend_is_listed_and_generates(written: Path, tiny: Path):
    listed = run(written, "-m", "phicore", "backends")
    assert "abacus_2" in listed.stdout
    done = run(
        written,
        *(
            "-m",
            "phicore",
            "generate",
            "-m",
            str(tiny),
            "-b",
            "abacus_2",
            "-n",
            "3",
            "-t",
            "0",
            "a",
        ),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_new_backend_does_not_overwrite(phicore: Callable, written: Path):
    (written / "README.md").write_text("mine")
    result = phicore("new-backend", "abacus_2", "--into", written.parent)
    assert result.code == 1
    assert result.err.endswith("exists already; choose another name or folder\n")
    assert (written / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["Abacus", "2beads", "a-b", "", "a b", "../x"])
def test_new_backend_name_must_be_one(phicore: Callable, name: str, tmp_path: Path):
    result = phicore("new-backend", "--into", tmp_path, "--", name)
    assert result.code == 2
    assert result.err.startswith("phicore: name: expected lower case letters")
    assert not list(tmp_path.glob("phicore-*"))
