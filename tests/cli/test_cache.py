"""Tests of `phicore cache`: what it shows, and what it removes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import platformdirs
import pytest

DAY_S = 86400


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill a cache folder of the test's own, and hide the user's downloads."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr("phicore.sources.known_models", lambda: [])
    sizes = {
        "packed/phi-1234.arrays": (3000, 3),
        "packed/.phi-1234.arrays.x.partial": (100, 0),
        "kernels/abc/pack.o": (20, 40),
        "kernels/abc/rows.o": (30, 2),
        "kernels/def/pack.o": (50, 50),
        "jax-0.10.2/jit_step": (500, 1),
        "synthetic/tiny.gguf": (7000, 100),
    }
    for name, (size, days) in sizes.items():
        path = tmp_path / "phicore" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(size))
        used_s = time.time() - days * DAY_S - 60
        os.utime(path, (used_s, used_s))
    return tmp_path / "phicore"


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_listing_has_kinds_sizes_and_last_uses(phicore, folder: Path) -> None:
    result = phicore("cache")
    assert result.code == 0
    rows = [line.split() for line in result.out.splitlines()]
    assert rows == [
        ["kind", "name", "size", "last", "use"],
        ["packed", ".phi-1234.arrays.x.partial", "100", "B", "1", "minute", "ago"],
        ["packed", "phi-1234.arrays", "3.0", "kB", "3", "days", "ago"],
        ["compiled", "kernels", "100", "B", "2", "days", "ago"],
        ["compiled", "jax-0.10.2", "500", "B", "1", "day", "ago"],
        ["synthetic", "tiny.gguf", "7.0", "kB", "100", "days", "ago"],
    ]
    assert "packed: weights in the form that the kernels read, 3.1 kB; " in result.err
    assert f"folder: {folder}" in result.err.replace("\n", "")


def test_listing_as_json(phicore, folder: Path) -> None:
    found = json.loads(phicore("cache", "--json").out)
    assert {(f["kind"], Path(f["path"]).name, f["size_bytes"]) for f in found} == {
        ("packed", "phi-1234.arrays", 3000),
        ("packed", ".phi-1234.arrays.x.partial", 100),
        ("compiled", "abc", 50),
        ("compiled", "def", 50),
        ("compiled", "jax-0.10.2", 500),
        ("synthetic", "tiny.gguf", 7000),
    }
    used = {Path(f["path"]).name: f["last_use"] for f in found}
    expected_s = (folder / "synthetic/tiny.gguf").stat().st_mtime
    assert used["tiny.gguf"] == time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(expected_s))


def test_downloads_are_shown_and_not_removed(phicore, tmp_path: Path, monkeypatch) -> None:
    from phicore.sources import KnownModel

    path = tmp_path / "hub" / "m.gguf"
    path.parent.mkdir()
    path.write_bytes(bytes(900))
    known = [KnownModel("m", "hf:owner/repo/m.gguf", path, 900)]
    monkeypatch.setattr("phicore.sources.known_models", lambda: known)
    result = phicore("cache")
    assert ["downloads", "m.gguf", "900", "B", "now"] in [
        x.split() for x in result.out.splitlines()
    ]
    assert "hf cache rm" in result.err
    assert phicore("cache", "clear").code == 0
    assert path.exists()
    result = phicore("cache", "clear", "downloads")
    assert result.code == 2
    assert "`hf cache rm` removes downloads" in result.err


def test_clear_removes_everything_and_says_so(phicore, folder: Path) -> None:
    result = phicore("cache", "clear")
    assert result.code == 0
    assert result.err == "removed 7 files, 10.7 kB\n"
    assert len(result.out.splitlines()) == 6
    assert files(folder) == set()
    assert phicore("cache").out == ""
    assert phicore("cache", "clear").err == "removed 0 files, 0 B\n"


@pytest.mark.parametrize("kind", ["packed", "compiled", "synthetic"])
def test_clear_of_a_kind_leaves_the_others(phicore, folder: Path, kind: str) -> None:
    before = files(folder)
    assert phicore("cache", "clear", kind).code == 0
    of_kind = {"packed": ("packed",), "compiled": ("kernels", "jax-"), "synthetic": ("synth",)}
    assert files(folder) == {name for name in before if not name.startswith(of_kind[kind])}


def test_clear_of_what_was_not_used_for_days(phicore, folder: Path) -> None:
    result = phicore("cache", "clear", "--unused-days", 10, "--dry-run")
    assert result.err == "would remove 2 files, 7.0 kB\n"
    assert len(files(folder)) == 7
    assert phicore("cache", "clear", "--unused-days", 10).code == 0
    gone = {"kernels/def/pack.o", "synthetic/tiny.gguf"}
    assert len(files(folder)) == 5
    assert not files(folder) & gone


def test_unknown_kind_is_an_error(phicore, folder: Path) -> None:
    result = phicore("cache", "clear", "weights")
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        "phicore: kind: expected one of packed, compiled, synthetic, got 'weights'\n"
    )
    assert len(files(folder)) == 7


def test_dir_prints_the_folder(phicore, folder: Path) -> None:
    assert phicore("cache", "dir").out == f"{folder}\n"


def test_machine_without_a_cache_has_an_empty_listing(phicore, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "none" / name)
    result = phicore("cache")
    assert (result.code, result.out) == (0, "")
    assert json.loads(phicore("cache", "--json").out) == []


@pytest.mark.complete
@pytest.mark.skipif(os.name != "posix", reason="weights are kept on POSIX alone")
def test_short_command_keeps_weights_and_the_next_maps_them(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("phicore_jax.kernels.runtime", reason="install phicore[jax]")
    program = (
        "import pathlib, sys, platformdirs\n"
        f"folder = pathlib.Path({str(tmp_path)!r}, 'own')\n"
        "platformdirs.user_cache_path = lambda name: folder / name\n"
        "from phicore_jax.kernels import kept\n"
        "kept.LEAST_BYTES = 0\n"
        "from phicore.__main__ import main\n"
        "main()"
    )
    command = [sys.executable, "-c", program, "generate", "-m", str(tiny), "-b", "jax"]
    command += ["-n", "2", "-t", "0", "--no-stats"]
    environment = os.environ | {"PHICORE_PACKED_CACHE": "1GB"}

    def text(*more: str) -> bytes:
        line = [*command, *more, "Hello"]
        return subprocess.run(line, env=environment, capture_output=True, check=True).stdout

    exact = text("--no-packed-cache")
    assert not (tmp_path / "own" / "phicore" / "packed").exists()
    assert text() == exact
    (kept_file,) = (tmp_path / "own" / "phicore" / "packed").iterdir()
    written = kept_file.stat()
    assert text() == exact
    used = kept_file.stat()
    assert (used.st_ino, used.st_size) == (written.st_ino, written.st_size)
    assert used.st_mtime_ns > written.st_mtime_ns  # used, not written again
