"""Builds phicore's distributions with uv, and makes empty environments for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Project:
    """A distribution of this repository: its folder, and `[project]` of its pyproject.toml."""

    folder: Path
    about: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.about["name"])

    @property
    def package(self) -> Path:
        """The folder of the package, in which all is that a wheel holds."""
        return self.folder / self.name.replace("-", "_")

    @property
    def files(self) -> set[str]:
        """The files of the package, relative to the folder of the project."""
        return {
            path.relative_to(self.folder).as_posix()
            for path in self.package.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }


def projects() -> list[Project]:
    """Return all distributions: the root, backends and plugins."""
    found = []
    for file in (
        ROOT / "pyproject.toml",
        *sorted(ROOT.glob("backends/*/pyproject.toml")),
        *sorted(ROOT.glob("plugins/*/pyproject.toml")),
    ):
        found.append(Project(file.parent, tomllib.loads(file.read_text())["project"]))
    return found


def uv(*arguments: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Run uv and return what it printed; skip the test where there is none."""
    program = shutil.which("uv")
    if program is None:
        pytest.skip("needs uv: pip install uv")
    done = subprocess.run(
        [program, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: Path, *options: str) -> dict[str, list[Path]]:
    """Build all distributions into a folder; return the files by name of the distribution."""
    uv("build", "--quiet", "--all-packages", "--out-dir", folder, *options)
    return {
        project.name: sorted(folder.glob(f"{project.name.replace('-', '_')}-[0-9]*"))
        for project in projects()
    }


def python(version: str) -> str:
    """Return an interpreter of this version, such as "3.13"; skip the test if there is none."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [sys.executable, shutil.which(name), *sorted(pyenv.glob(f"{version}*/bin/{name}"))]
    for candidate in found:
        if candidate is None:
            continue
        command = [str(candidate), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return str(candidate)
    pytest.skip(f"needs an interpreter of Python {version}")


@dataclass(frozen=True)
class Environment:
    """An environment in which nothing is installed but what a user would install.

    Attributes:
        folder: Its folder.
        home: An empty folder, the home of its user, in which commands run.
    """

    folder: Path
    home: Path

    def install(self, *what: str | Path, options: Sequence[str] = ()) -> None:
        uv("pip", "install", "--quiet", "--python", self.folder, *options, *what, cwd=self.home)

    def env(self) -> dict[str, str]:
        """Return the variables of the environment, without those of who runs the tests."""
        hidden = ("PHICORE_", "PYTHON", "VIRTUAL_ENV", "XDG_", "JAX_", "HF_", "PYTEST", "TMPDIR")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        path = f"{self.folder / 'bin'}{os.pathsep}{kept.get('PATH', '')}"
        # Nothing is downloaded, whatever a command asks for.
        return {**kept, "HOME": str(self.home), "HF_HUB_OFFLINE": "1", "PATH": path}

    def phicore(self, *arguments: str) -> tuple[int, str, str]:
        """Run the command; return its exit code, its output and what it told."""
        done = subprocess.run(
            [str(self.folder / "bin" / "phicore"), *arguments],
            cwd=self.home,
            env=self.env(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr


def environment(folder: Path, version: str) -> Environment:
    """Make an empty environment."""
    uv("venv", "--quiet", "--python", python(version), folder / "venv", cwd=folder)
    home = folder / "home"
    home.mkdir()
    return Environment(folder / "venv", home)
