"""Runs a module of phicore in a process of its own, which may crash or hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        seconds: How long it ran.
        result: What it wrote, or None.
        reason: Why it wrote nothing, in one line, or None.
    """

    seconds: float
    result: dict[str, Any] | None = None
    reason: str | None = None


def run(
    module: str, arguments: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None
) -> Ended:
    """Run a module that writes JSON into the file that its first argument names.

    The process finds the same modules as this one, and reads nothing from standard input.

    Args:
        arguments: The other arguments.
        timeout_s: The process is killed after this time, with all that it started.
        env: Environment variables to add to those of this process.
    """
    with tempfile.TemporaryDirectory(prefix="phicore-") as folder:
        written = Path(folder) / "result.json"
        started_s = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(written), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": _path(), **(env or {})},
            start_new_session=True,
        )
        is_late = False
        try:
            said = process.communicate(timeout=timeout_s)[1]
        except subprocess.TimeoutExpired:
            is_late = True
            said = b""
        finally:
            _kill(process)
        seconds = time.perf_counter() - started_s
        if is_late:
            return Ended(seconds, reason=f"no end after {timeout_s:g} s")
        if process.returncode == 0 and written.is_file():
            return Ended(seconds, json.loads(written.read_text(encoding="utf-8")))
        return Ended(seconds, reason=_why(process.returncode, said.decode(errors="replace")))


def _path() -> str:
    """Return this process's import path. Its first entry, "", is the current folder."""
    return os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, with those that it started, and wait for it."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
    if process.stderr is not None:
        process.stderr.close()


def _why(code: int, said: str) -> str:
    """Say in one line how a process ended, with the last line that it wrote."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = f": {lines[-1][:200]}" if lines else ""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"it ends the process with {name}{last}"
    return f"it ends the process with exit code {code}{last}"
