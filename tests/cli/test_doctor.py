"""Tests of `phicore doctor`: what it tells, what it hides, and backends that fail in every way."""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.throwaway import Install, install

from phicore.lab import children, facts
from phicore.lab.privacy import remover

__all__ = ["install"]

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

FAULTY = """
    import os
    import signal
    import time

    from phicore import hookimpl

    @hookimpl
    def phicore_register_backends(register):
        def raises(options):
            raise RuntimeError("libdriver.so.1 is missing\\nand more")

        def turned(options):
            from phicore_numpy.backend import NumpyBackend

            class Turned(NumpyBackend):
                def rope(self, x, cos, sin):
                    return super().rope(x, cos, -sin)

                def rms_norm(self, x, weight, eps):
                    return super().rms_norm(x[..., ::-1], weight, eps)

            return Turned(options)

        def hangs(options):
            time.sleep(1000)

        def devices():
            os.write(2, b"illegal instruction in libfoo\\n")
            os.kill(os.getpid(), signal.SIGILL)

        cpu = {"devices": lambda: ["cpu"], "protocol": 2}
        register("raises", create=raises, **cpu)
        register("turned", create=turned, **cpu)
        register("hangs", create=hangs, **cpu)
        register("kills", create=raises, devices=devices, protocol=2)
"""


def test_each_way_to_fail_is_a_line(phicore: Callable, install: Install) -> None:
    install("faulty", "faulty", FAULTY)
    result = phicore("doctor", "-b", "raises", "-b", "turned", "-b", "kills")
    lines = [line for line in result.out.splitlines() if line.startswith("FAILED")]
    assert result.code == 1
    assert "Traceback" not in result.out + result.err
    said = "backend raises: not usable: RuntimeError: libdriver.so.1 is missing"
    assert lines[0] == f"FAILED raises: {said}"
    assert lines[1].startswith(
        "FAILED turned on cpu: another greedy text from token 1 on; relative"
    )
    assert lines[2] == (
        "FAILED kills: it ends the process with SIGILL: illegal instruction in libfoo"
    )
    assert result.out.endswith("\nnot all is well\n")


def test_good_backend_passes_and_nothing_private_is_told(
    phicore: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PHICORE_API_KEY", "very-secret")
    monkeypatch.setenv("PHICORE_TEAM_KEY", "also-secret")
    monkeypatch.setenv("PHICORE_MODEL", "/models/diary.gguf")
    monkeypatch.setenv("PHICORE_PACKED_CACHE", "3GB")
    monkeypatch.setenv("PHICORE_DATA", str(tmp_path / "my data"))
    result = phicore("doctor", "-b", "numpy", "--json")
    report = json.loads(result.out)
    assert result.code == 0
    assert report["is_well"]
    [test] = report["tests"]
    assert (test["backend"], test["device"], test["outcome"]) == ("numpy", "cpu", "passed")
    assert test["relative_error"] < 1e-4
    assert {"numpy", "jinja2"} <= report["libraries"].keys()
    assert {row["name"] for row in report["plugins"]} >= {"built-in", "numpy"}
    variables = report["variables"]
    assert variables["PHICORE_PACKED_CACHE"] == "3GB"
    assert variables["PHICORE_API_KEY"] is variables["PHICORE_MODEL"] is None
    [told] = [row for row in report["folders"] if row["kind"] == "conversations"]
    assert told == {
        "kind": "conversations",
        "path": "~/my data",
        "size_bytes": 0,
        "files": 0,
        "is_writable": True,
        "is_shared": False,
    }
    for private in ("secret", "diary", str(tmp_path)):
        assert private not in result.out


@pytest.mark.complete
def test_backend_that_hangs_is_killed_after_the_time_limit(
    phicore: Callable, install: Install
) -> None:
    install("faulty", "faulty", FAULTY)
    result = phicore("doctor", "-b", "hangs", "--timeout", "15")
    assert result.code == 1
    assert "FAILED hangs: no end after 15 s\n" in result.out


@pytest.mark.complete
@posix
def test_plugin_that_ends_the_process_is_named_and_left_out(
    phicore: Callable, install: Install
) -> None:
    install("deadly", "deadly", "import os\nos.abort()\n")
    result = phicore("doctor", "-b", "numpy")
    assert result.code == 1
    assert "BROKEN deadly: not usable: it ends the process with SIGABRT\n" in result.out
    assert "FAILED" not in result.out
    assert "numpy    cpu     passed" in result.out


@pytest.mark.complete
def test_all_installed_backends_are_tested(phicore: Callable) -> None:
    report = json.loads(phicore("doctor", "--json").out)
    assert report["is_well"]
    assert {test["backend"] for test in report["tests"]} == {b["name"] for b in report["backends"]}


@pytest.mark.complete
def test_backend_that_is_not_installed_is_told(phicore: Callable) -> None:
    result = phicore("doctor", "-b", "nosuch")
    assert result.code == 1
    assert "FAILED nosuch: no backend 'nosuch'; installed: " in result.out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os._exit(0)", "exit code 0"),
        ("import sys; print('no\\n room\\n', file=sys.stderr); sys.exit(3)", "exit code 3: room"),
    ],
)
def test_process_that_writes_nothing_says_how_it_ended(
    code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaving.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    ended = children.run("leaving", (), timeout_s=60)
    assert (ended.result, ended.reason) == (None, f"it ends the process with {reason}")


@posix
def test_process_that_hangs_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import pathlib, subprocess, sys, time\n"
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(other.pid))\n"
        "time.sleep(1000)\n"
    )
    (tmp_path / "hanging.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    ended = children.run("hanging", (), timeout_s=3)
    assert (ended.result, ended.reason) == (None, "no end after 3 s")
    other = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if _is_dead(other):
            return
        time.sleep(0.1)
    os.kill(other, signal.SIGKILL)
    pytest.fail("the process that the hanging one started still runs")


def _is_dead(pid: int) -> bool:
    """Return whether a process has ended, though perhaps nobody has asked for its exit code."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_names_of_people_and_machines_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(socket, "gethostname", lambda: "engine.example.org")
    clean = remover()
    text = "open /home/ada/m.gguf, /data/ada/x and /home/adam on ENGINE or engine.example.org: no"
    expected = "open ~/m.gguf, /data/USER/x and /home/adam on HOST or HOST: no"
    assert clean({"a": [text, 1, None]}) == {"a": [expected, 1, None]}


def test_values_of_unknown_variables_are_hidden() -> None:
    env = {
        "PHICORE_CPU": "avx2",
        "PHICORE_ANYTHING": "x",
        "HF_TOKEN": "x",
        "XLA_FLAGS": "--url=https://me:pass@host/x",
        "PATH": "/bin",
    }
    assert facts.variables(env) == {
        "HF_TOKEN": None,
        "PHICORE_ANYTHING": None,
        "PHICORE_CPU": "avx2",
        "XLA_FLAGS": "--url=https://host/x",
    }


def test_extras_name_what_is_missing(install: Install, tmp_path: Path) -> None:
    found = {row["name"]: row["missing"] for row in facts.extras()}
    assert found["numpy"] == []
    assert {"jax", "cuda", "mlx", "numpy", "grammar", "serve", "testing"} == found.keys()
    install("needy", "needy", "")
    info = tmp_path / "needy" / "needy-1.2.dist-info" / "METADATA"
    info.write_text(
        info.read_text() + "Provides-Extra: more\nRequires-Dist: numpy\n"
        "Requires-Dist: nosuch-thing>=2; extra == 'more'\n"
        "Requires-Dist: nosuch-other; extra == 'more' and python_version < '3'\n"
        "Requires-Dist: phicore[numpy]; extra == 'more'\n"
    )
    assert facts._missing("needy", "more") == ["nosuch-thing"]


@posix
@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        rows = facts.folders({"mine": tmp_path / "below"})
    finally:
        tmp_path.chmod(0o700)
    assert [row["is_writable"] for row in rows if row["kind"] == "mine"] == [False]


@posix
def test_folder_that_everybody_can_write_to_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    rows = facts.folders({"mine": tmp_path})
    assert [row["is_shared"] for row in rows if row["kind"] == "mine"] == [True]


@pytest.mark.parametrize("limit", ["inf", "1e30", "nan", "0"])
def test_doctor_refuses_a_time_that_nothing_can_wait_for(phicore: Callable, limit: str) -> None:
    """An infinite one ended in a traceback."""
    result = phicore("doctor", "--timeout", limit)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("phicore: --timeout: expected ")
