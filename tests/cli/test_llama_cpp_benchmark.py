"""Tests of `benchmarks/vs_llama_cpp.py` with fake engines: its requests and its output."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs
import pytest

from phicore.lab import machine

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
QUICK = (
    *("--synthetic", "tiny", "--repetitions", "1", "--starts", "0"),
    *("--prompts", "16,32", "--no-fidelity"),
)


class StandIn:
    """A fake worker that answers at once and records its options and the requests."""

    made: tuple[dict[str, Any], ...] = ()
    asked: tuple[tuple[Any, ...], ...] = ()

    def __init__(self, python: str, engine: str, **options: Any) -> None:
        self._engine = engine
        StandIn.made += ({"engine": engine, **options},)

    def ask(self, *command: Any) -> Any:
        StandIn.asked += (command,)
        return self._engine if command == ("about",) else 2.0

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)
    program = importlib.import_module("vs_llama_cpp")
    monkeypatch.setattr(program, "Worker", StandIn)
    monkeypatch.setattr(program, "PAUSE_S", 0)
    monkeypatch.setattr(program, "check_llama_cpp", lambda python: None)
    monkeypatch.setattr(program, "has_fast_prefill", lambda threads: True)
    StandIn.made = StandIn.asked = ()
    yield program
    for name in ("vs_llama_cpp", "engines"):
        sys.modules.pop(name, None)


def run(program: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["vs_llama_cpp.py", *QUICK, *options])
    program.main()


def test_fast_prefill_has_rows_where_the_processor_has_it(program, monkeypatch, capsys):
    run(program, monkeypatch, "--json")
    found = capsys.readouterr()
    names = [row["name"] for row in json.loads(found.out)["rows"] if "prompt" in row["name"]]
    assert names == ["prompt of 16", "prompt of 16, fast", "prompt of 32", "prompt of 32, fast"]
    assert [made.get("fast_prefill") for made in StandIn.made] == [None, False, True]
    assert found.err == ""


def test_fast_prefill_is_left_out_where_the_processor_has_none(program, monkeypatch, capsys):
    """A worker for fast prefill was once made anyway, and failed after all the starts."""
    monkeypatch.setattr(program, "has_fast_prefill", lambda threads: False)
    run(program, monkeypatch, "--json")
    found = capsys.readouterr()
    names = [row["name"] for row in json.loads(found.out)["rows"] if "prompt" in row["name"]]
    assert names == ["prompt of 16", "prompt of 32"]
    assert not any(made.get("fast_prefill") for made in StandIn.made)
    assert found.err == f"{program.NO_FAST_PREFILL}\n"


def test_threads_are_named_to_phicore_only_if_they_were_given(program, monkeypatch, capsys):
    """The JAX backend without kernels refuses any number of threads."""
    run(program, monkeypatch, "--no-fast-prefill")
    peer, phicore = StandIn.made
    assert (phicore["threads"], peer["n_threads"] >= 1) == (None, True)
    StandIn.made = ()
    run(program, monkeypatch, "--no-fast-prefill", "--threads", "3")
    peer, phicore = StandIn.made
    assert (phicore["threads"], peer["n_threads"]) == (3, 3)
    assert "--threads 3" in capsys.readouterr().out


def test_depth_of_0_goes_on_from_one_token(program, monkeypatch, capsys):
    """Without a token llama.cpp has no logits, and once returned a NULL pointer for them."""
    run(program, monkeypatch, "--depths", "0,1,40", "--steps", "5")
    asked = {command for command in StandIn.asked if command[0] == "decode"}
    assert asked == {("decode", 5, 1), ("decode", 5, 40)}
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert "decode, tokens/s" in names
    assert "decode after 40, tokens/s" in names


def test_prompts_of_0_are_none(program, monkeypatch, capsys):
    run(program, monkeypatch, "--prompts", "0")
    assert not any(command[0] == "prefill" for command in StandIn.asked)
    assert "prompt of" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--depths", "-1"), "expected 0 or more, such as 128,512; got '-1'"),
        (("--steps", "0"), "expected 1 or more, got '0'"),
        (("--repetitions", "0"), "expected 1 or more, got '0'"),
    ],
)
def test_wrong_option_is_told_at_once(program, monkeypatch, capsys, options, message: str):
    with pytest.raises(SystemExit) as caught:
        run(program, monkeypatch, *options)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
