"""Disks that are full or read-only, little memory, clocks that jump: one clear line for each."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from api.tiny_models import write_tiny
from chat.test_conversation import say

import phicore
from phicore.chat.conversation import Conversation
from phicore.chat.store import Store

resource = pytest.importorskip("resource", reason="limits of POSIX")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("limits") / "tiny.gguf")


def run(
    *arguments: object, limit: tuple[int, int] | None = None, stdin: str = "", **environment: str
) -> tuple[int, str, list[str]]:
    """Run phicore; return the exit code, standard output and the lines on standard error.

    Args:
        limit: A limit of the system, and its value in bytes.
    """
    limited = "" if limit is None else f"resource.setrlimit({limit[0]}, ({limit[1]}, {limit[1]}))"
    program = f"import resource, runpy\n{limited}\nrunpy.run_module('phicore', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, **environment},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("phicore: ")]
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return done.returncode, done.stdout, lines


def test_answers_that_a_full_disk_has_no_room_for_are_computed_later(tiny: Path, tmp_path: Path):
    requests = [{"id": f"é{i}", "prompt": "Hi", "seed": i, "max_tokens": 90} for i in range(9)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(each) for each in requests))
    out = tmp_path / "out.jsonl"
    options = ["generate", "-m", tiny, "-b", "numpy", "--batch", tmp_path / "in.jsonl"]
    code, _, lines = run(*options, "--out", out, limit=(resource.RLIMIT_FSIZE, 1000))
    assert code == 2
    assert len(lines) == 1
    assert lines[0].endswith(f"{out}: cannot be written: File too large; the answers in it stay")
    kept = out.read_bytes().split(b"\n")[:-1]
    assert 0 < len(kept) < len(requests)
    assert run(*options, "--out", out)[0] == 0
    found = out.read_bytes().split(b"\n")[:-1]
    assert found[: len(kept)] == kept
    assert sorted(json.loads(line)["id"] for line in found) == [each["id"] for each in requests]


def test_session_that_a_full_disk_has_no_room_for_is_one_line(tiny: Path, tmp_path: Path):
    path = tmp_path / "s.session"
    options = ["generate", "-m", tiny, "-b", "numpy", "-n", "30", "--seed", "1", "--session", path]
    code, text, lines = run(*options, "Hi", limit=(resource.RLIMIT_FSIZE, 4096))
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith(f"phicore: {path}: cannot be written: ")
    assert text  # the answer is there
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["full", "readonly"])
def bad_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Mount a disk that takes nothing, which only root may do."""
    path = tmp_path / "disk"
    path.mkdir()
    size = "size=64k" if request.param == "full" else "size=64k,ro"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a disk")
    if request.param == "full":
        (path / "filling").write_bytes(bytes(1 << 16))
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.complete
def test_caches_and_data_on_a_disk_that_takes_nothing(
    bad_disk: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    where = {name: str(bad_disk) for name in ("XDG_CACHE_HOME", "PHICORE_DATA", "HF_HOME")}
    where["PHICORE_PACKED_CACHE"] = "1GB"
    with phicore.load(tiny, "jax") as model:
        expected = model.generate("Hi", max_tokens=30, seed=1).text()
    options = ["-m", tiny, "-n", "30", "--seed", "1"]
    code, text, lines = run("generate", "-b", "jax", *options, "Hi", **where)
    same = expected.strip().replace("\r", "\n")  # as Python reads the output of programs
    assert (code, text.strip(), lines) == (0, same, [])
    code, _, lines = run(
        *("generate", "-b", "numpy", *options, "--session", bad_disk / "s", "Hi"), **where
    )
    assert (code, len(lines)) == (1, 1)
    code, text, _ = run("chat", "-b", "numpy", *options, stdin="Hello\n/quit\n", **where)
    assert code == 0
    code, _, lines = run("bench", "--synthetic", "tiny", "-b", "numpy", **where)
    assert (code, len(lines)) == (1, 1)
    assert {each.name for each in bad_disk.iterdir()} <= {"filling", "phicore", "chats"}


@pytest.mark.parametrize("megabytes", [600])
def test_too_few_addresses_for_jax_are_one_line(tiny: Path, megabytes: int):
    limit = (resource.RLIMIT_AS, megabytes << 20)
    code, _, lines = run("generate", "-b", "jax", "-m", tiny, "-n", "3", "Hi", limit=limit)
    assert (code, len(lines)) == (1, 1)
    assert f"may have {megabytes} MB of addresses (ulimit -v), and JAX needs" in lines[0]


def test_half_of_a_file_in_jaxs_cache_is_removed(tmp_path: Path):
    code_files = pytest.importorskip("phicore_jax.code_files")
    whole = zlib.compress(b"program" * 1000)
    for name, data in (("a-cache", whole), ("b-cache", whole[:20]), ("c-cache", b""), ("x", b"y")):
        (tmp_path / name).write_bytes(data)
    code_files.remove_damaged(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a-cache", "x"}
    code_files.remove_damaged(tmp_path / "none")


def test_conversation_that_another_program_changed_is_noticed_though_the_clock_stands_still(
    tmp_path: Path,
):
    ours, theirs = (Store(tmp_path, 10**6) for _ in range(2))
    talk = Conversation("talk")
    say(talk, "one")
    ours.save(talk)
    other = theirs.load("talk")
    before = ours.path("talk").stat()
    other.turns[0] = other.turns[0].__class__(**{**vars(other.turns[0]), "user": "two"})
    theirs.save(other)
    os.utime(ours.path("talk"), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ours.path("talk").stat().st_size == before.st_size
    assert ours.save(talk)  # it gets a name of its own
    assert theirs.load("talk").turns[0].user == "two"


DATES = {
    "phicore/server/service.py": 1,  # when the model was made, for /v1/models
    "phicore/server/answers.py": 1,  # when an answer was made
    "phicore/disk/folders.py": 1,  # the age of files
    "phicore/cli/cache.py": 1,  # the age of files
}
"""How often each file may ask for the time of day; all others never do."""


def _asks_for_the_date(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in {("time", "time"), ("time", "time_ns")}
    )


def test_no_duration_is_a_difference_of_dates():
    found = {}
    for folder in ("phicore", "backends", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            if "tests" not in path.parts and ".venv" not in path.parts:
                count = sum(map(_asks_for_the_date, ast.walk(ast.parse(path.read_text("utf-8")))))
                found[path.relative_to(ROOT).as_posix()] = count
    assert {p: n for p, n in found.items() if n} == {p: n for p, n in DATES.items() if n}
