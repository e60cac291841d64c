"""Tests of `benchmarks/peers.py`: real processes of phicore on a tiny model, and its options."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs
import pytest
from conftest import BACKENDS

from phicore.lab import machine

needs_numpy = pytest.mark.skipif("numpy" not in BACKENDS, reason="install phicore-numpy")


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)
    return importlib.import_module("peers")


def run(peers: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """Run the program and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["peers.py", *options])
    with pytest.raises(SystemExit) as caught:
        peers.main()
    return caught.value.code


SMALL = (
    *("--synthetic", "tiny", "--peer", "none", "--backend", "numpy", "--rounds", "2"),
    *("--steps", "3", "--prompts", "5", "--depths", "9", "--sequences", "2", "--starts", "1"),
)


@needs_numpy
def test_all_sections_are_measured_remembered_and_checked(
    peers: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    path, past = tmp_path / "found.json", tmp_path / "history.jsonl"
    store = ("--json", str(path), "--remember", "--check", "--history", str(past))
    assert run(peers, monkeypatch, *SMALL, *store) == 0
    found = json.loads(path.read_text())
    rows = {row["name"]: row["values"] for row in found["rows"]}
    assert [*rows] == [
        "decode",
        "decode, of the memory bandwidth",
        "decode of 2 at once",
        "2 at once over one alone",
        "prompt of 5",
        "prompt of 9",
        "prompt of 9: what exceeds prompts of 512",
        "decode after 9",
        "decode after 9, over the least time",
        "process start to first token",
        "its peak memory over the file",
        "error of the logits, random tokens",
        "error at the median position, random tokens",
    ]
    assert all(len(rows[name]["phicore numpy"]) == 2 for name in rows if name.startswith("dec"))
    errors = rows["error of the logits, random tokens"]
    assert errors["phicore numpy"][0] < 1e-6
    assert 1e-3 < errors["llama.cpp's arithmetic"][0] < 5e-2
    assert len(past.read_text().splitlines()) == 1
    printed = capsys.readouterr().out
    assert "phicore numpy: phicore" in printed
    assert "no figure is worse than in the last 1 runs" in printed  # the run itself


@needs_numpy
def test_results_become_tables_of_a_document(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    found, document = tmp_path / "found.json", tmp_path / "page.md"
    options = ("--sections", "decode", "--json", str(found))
    assert run(peers, monkeypatch, *SMALL, *options) == 0
    document.write_text("before\n<!-- peers.py -->\nold\n<!-- end of peers.py -->\nafter\n")
    assert run(peers, monkeypatch, "--from", str(found), "--into", str(document)) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- peers.py -->\ntiny-q4_k_m-2.gguf")
    assert "| decode, tokens/s | " in text
    assert "old" not in text
    assert text.endswith("<!-- end of peers.py -->\nafter\n")


@needs_numpy
def test_quick_changes_only_what_was_not_chosen(peers: ModuleType):
    chosen = peers.options(["--quick", "--prompts", "7", "--sections", "errors"])
    assert (chosen.prompts, chosen.sections, chosen.rounds) == ([7], ["errors"], 2)
    assert peers.options([]).sections == list(peers.SECTIONS)


@needs_numpy
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--peer", "llama"), "no peer 'llama'; there are: llama.cpp, "),
        (("--peer", "llama.cpp=/no/python"), "/no/python: it has no llama_cpp; `uv run --with"),
        (("--peer", "ik_llama.cpp=/no/bench"), "expected ik_llama.cpp=PATH of the program"),
        (("--backend", "abacus"), "no backend 'abacus'; there are: "),
        (("--from", "/no/file"), "No such file"),
    ],
)
def test_what_is_not_there_is_told_in_a_line(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
):
    status = run(peers, monkeypatch, "--synthetic", "tiny", "--backend", "numpy", *options)
    assert status.startswith("peers: ")
    assert message in status
    assert "\n" not in status


@needs_numpy
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--depths", "-1"), "expected 0 or more, such as 128,512; got '-1'"),
        (("--steps", "0"), "expected 1 or more, got '0'"),
        (("--sections", "decode,sleep"), "no section 'sleep'; decode, prompts, "),
    ],
)
def test_wrong_option_is_told_at_once(
    peers: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
):
    assert run(peers, monkeypatch, *options) == 2
    assert message in capsys.readouterr().err
