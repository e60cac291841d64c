"""Tests that the import contracts between rooms hold, and that each one detects a violation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PARENTS = ("", "backends/jax", "backends/mlx", "plugins/array-api-strict", "plugins/numpy")
CONTRACTS = {
    contract["id"]: contract["name"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
}
BREAKS = {
    "rooms": ("phicore/network/graph.py", "from phicore.engine import Engine"),
    "circles": ("phicore/gguf/parser.py", "from phicore.gguf.reader import open_gguf"),
    "libraries": ("phicore/lab/tracing.py", "import jax"),
    "backends": ("phicore_numpy/backend.py", "from phicore.network import graph"),
    "replicas": ("phicore_ray/replica.py", "from phicore.network import graph"),
}

pytest.importorskip("importlinter", reason="install import-linter (uv sync --group test)")


def lint(folder: Path) -> tuple[int, str]:
    """Check the contracts on the packages in a folder; return the exit status and the output."""
    code = "import importlinter.cli; importlinter.cli.lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache", "--no-logo"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy all packages into one folder."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for parent in (*PARENTS, "plugins/ray", "plugins/torch"):
        for package in (ROOT / parent).glob("phicore*/__init__.py"):
            name = package.parent.name
            shutil.copytree(
                package.parent, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
    return folder


def test_contracts_hold(house: Path):
    code, out = lint(house)
    assert code == 0, out
    assert out.count("KEPT") == len(CONTRACTS) == len(BREAKS)


@pytest.mark.parametrize("contract", BREAKS)
@pytest.mark.parametrize("is_typing", [False, True], ids=["import", "type-checking"])
def test_contract_that_is_broken_is_named(house: Path, contract: str, is_typing: bool):
    """An import that only a type checker sees is a violation too."""
    file, line = BREAKS[contract]
    path = house / file
    text = path.read_text()
    added = f"if False:\n    {line}\n" if not is_typing else f"if TYPE_CHECKING:\n    {line}\n"
    imports = "from typing import TYPE_CHECKING\n" if is_typing else ""
    path.write_text(f"{text}\n{imports}{added}")
    try:
        code, out = lint(house)
    finally:
        path.write_text(text)
    assert code != 0
    assert f"{CONTRACTS[contract]} BROKEN" in out
