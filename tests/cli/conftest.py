"""Fixtures: tiny models, and the command line in this process or in a separate one."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from api.tiny_models import write_endless, write_tiny

from phicore.__main__ import main


@dataclass(frozen=True)
class Result:
    """The exit code of a run of the command, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model that, greedily and without a penalty, generates for longer than tests wait."""
    return write_endless(tmp_path_factory.mktemp("models") / "endless.gguf")


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the settings and colours of the person who runs the tests."""
    monkeypatch.setenv("PHICORE_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("PHICORE_DATA", str(tmp_path / "data"))
    for name in ("PHICORE_MODEL", "GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def phicore(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Return a function that runs the command in this process."""

    def run(*args: object, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["phicore", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer replaces it
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, printed.out, printed.err)

    return run


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[bytes]]:
    """Return a function that starts the command in a separate process, where warnings are errors.

    Its argument `redirect` is a redirection for a shell, such as ">&-" to close standard output.
    """

    def popen(
        *args: object, redirect: str | None = None, **options: object
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-W", "error", "-m", "phicore", *map(str, args)]
        if redirect is not None:
            command = ["sh", "-c", f'exec "$@" {redirect}', "sh", *command]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(command, **(pipes | options))  # type: ignore[call-overload]

    return popen
