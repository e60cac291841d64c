"""Tests of `phicore bench`: consistent figures in three forms (JSON, table, Markdown)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from api.tiny_models import write_tiny

from phicore.cli import terminal
from phicore.engine.timings import Timings
from phicore.errors import ArgumentError
from phicore.gguf.reader import open_gguf
from phicore.lab import bench, machine
from phicore.lab.synthetic import MODELS
from phicore.loading import load

QUICK = ("--synthetic", "tiny", "-b", "numpy", "-p", "8", "-n", "4", "-r", "2")


@pytest.fixture(autouse=True)
def _small_and_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(machine, "READ_BYTES", 2**20)


def test_json_has_figures_that_fit_together(phicore: Callable) -> None:
    result = phicore("bench", *QUICK, "-d", "0,20", "--json")
    found = json.loads(result.out)
    assert result.code == 0
    assert [row["name"] for row in found["rows"]] == ["pp8", "tg4", "tg4 @ d20"]
    assert (found["backend"], found["device"], found["repetitions"]) == ("numpy", "cpu", 2)
    assert found["file"].startswith("tiny-")
    assert found["size_bytes"] > found["bytes_per_step"]
    assert found["cpus"] >= 1
    assert found["cpu"]
    assert found["compile_s"] == 0
    assert found["load_s"] > 0
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 2**20
    memory = found["memory_bandwidth"]
    assert 0 < memory["median_gb_per_s"] <= memory["best_gb_per_s"]
    for row in found["rows"]:
        samples = row["samples_tokens_per_s"]
        assert len(samples) == 2
        assert min(samples) == row["min_tokens_per_s"] > 0
        assert max(samples) == row["max_tokens_per_s"]
        assert row["tokens_per_s"] == pytest.approx(sum(samples) / 2)
    prompt, decode, deep = found["rows"]
    assert (prompt["n_prompt"], prompt["weights_gb_per_s"]) == (8, None)
    assert prompt["share_of_bandwidth"] is None
    assert (decode["n_gen"], decode["depth"], deep["depth"]) == (4, 0, 20)
    gb_per_s = decode["tokens_per_s"] * found["bytes_per_step"] / 1e9
    assert decode["weights_gb_per_s"] == pytest.approx(gb_per_s)
    share = gb_per_s / memory["median_gb_per_s"]
    assert decode["share_of_bandwidth"] == pytest.approx(share)


def test_answers_that_are_generated_together_are_added(phicore: Callable) -> None:
    result = phicore("bench", *QUICK, "-B", "1,3", "-d", "0,6", "--json")
    rows = json.loads(result.out)["rows"]
    assert [row["name"] for row in rows] == ["pp8", "tg4", "tg4 x 3", "tg4 @ d6", "tg4 x 3 @ d6"]
    assert [row["sequences"] for row in rows] == [1, 1, 3, 1, 3]
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_table_has_a_row_for_each_test(phicore: Callable) -> None:
    result = phicore("bench", *QUICK, "-p", "16,8")
    assert result.code == 0
    head, _, rows = result.out.partition("\n\n")
    titles = [line.split()[0] for line in head.splitlines()]
    assert titles == ["model", "backend", "machine", "bandwidth", "cost", "figures"]
    lines = [line.split() for line in rows.splitlines()]
    assert lines[0] == ["test", "tokens/s", "min", "max", "weights,", "GB/s", "of", "memory"]
    assert [line[0] for line in lines[1:]] == ["pp8", "pp16", "tg4"]
    assert "\x1b" not in result.out
    assert "prompt:" not in result.err


def test_markdown_is_a_line_and_a_table(phicore: Callable) -> None:
    result = phicore("bench", *QUICK, "--markdown")
    head, blank, *rows = result.out.splitlines()
    assert head.startswith("model: tiny-")
    assert blank == ""
    assert [row.count("|") for row in rows] == [7] * 4
    assert rows[1] == "| --- | --- | --- | --- | --- | --- |"
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| pp8", "| tg4"]
    assert rows[3].endswith("% |")


def test_rows_run_as_many_tokens_as_they_say_and_one_to_begin_with(
    phicore: Callable, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    run = bench.Row.run

    def spy(row: bench.Row, *args: Any) -> Timings:
        timings = run(row, *args)
        asked.append((row.name, timings.prompt_tokens, timings.generated_tokens))
        return timings

    monkeypatch.setattr(bench.Row, "run", spy)
    result = phicore("bench", "-m", tiny, "-b", "numpy", "-p", 5, "-n", 30, "-d", 9, "-r", 1)
    assert result.code == 0
    assert asked == [("pp5", 5, 1), ("tg30 @ d9", 9, 31)] * 2


def test_measure_tells_the_row_the_run_the_tokens_and_the_time_left(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A benchmark once reported nothing but "measuring" for minutes."""
    monkeypatch.setattr(bench, "TELL_EVERY_S", 0.0)
    rows, moments = bench.plan(["5"], ["3"], ["0"]), []
    with load(tiny, "numpy") as model:
        bench.measure(model, rows, 2, moments.append)
    runs = [(name, run) for run in range(3) for name in ("pp5", "tg3")]
    assert list(dict.fromkeys((m.name, m.run) for m in moments)) == runs
    assert {m.runs for m in moments} == {2}
    for name, tokens, steps in (("pp5", 5, [0, 5]), ("tg3", 4, [0, 1, 2, 3, 4])):
        of_row = [m for m in moments if m.name == name]
        assert [m.done for m in of_row] == steps * 3
        assert {m.tokens for m in of_row} == {tokens}
    # The time of a row is known after its first run.
    assert all((m.left_s is None) == (m.run == 0) for m in moments)
    assert all(m.left_s >= 0 for m in moments if m.run)


def test_log_tells_at_once_and_then_now_and_then(
    phicore: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = "measuring pp8: warm-up, 0 of 8 tokens"
    told = [line for line in phicore("bench", *QUICK).err.splitlines() if "measuring" in line]
    assert told[0] == first
    assert told[-1].startswith("measuring: ")
    assert len(told) == 2

    monkeypatch.setattr(terminal, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(bench, "TELL_EVERY_S", 0.0)
    told = [line for line in phicore("bench", *QUICK).err.splitlines() if "measuring" in line]
    assert told[0] == first
    assert "measuring pp8: warm-up, 8 of 8 tokens" in told
    assert told[-2].startswith("measuring tg4: run 2 of 2, 5 of 5 tokens, ")
    assert told[-2].endswith(" s left")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_duration_is_for_people(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--synthetic", "phi-4"], "no synthetic model 'phi-4'; there are: phi-3-mini,"),
        (["--synthetic", "tiny", "-m", "x.gguf"], "--synthetic: it replaces the model"),
        (["--json", "--markdown"], "--markdown: not together with --json"),
        (["-p", "-1"], "--n-prompt: expected 0 or more, such as 128,512, got '-1'"),
        (["-n", "1.5"], "--n-gen: expected 0 or more"),
        (["-d", "1,,2"], "--depth: expected 0 or more, such as 128,512, got ''"),
        (["-p", "0", "-n", "0"], "nothing to measure: --n-prompt and --n-gen are both 0"),
        (["-r", "0"], "--repetitions: expected 1 or more, got '0'"),
        (["--synthetic", "tiny", "-b", "numpy", "-p", "4096"], "pp4096: needs a context of 4097"),
        (["--synthetic", "tiny", "-b", "numpy", "-d", "4032"], "tg64 @ d4032: needs a context of"),
    ],
)
def test_wrong_option_is_one_line(phicore: Callable, args: list[str], message: str) -> None:
    result = phicore("bench", *args)
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[-1].startswith("phicore: ")
    assert message in result.err
    assert result.err.count("phicore: ") == 1


def test_plan_takes_lists_and_repeated_options_and_drops_what_occurs_twice() -> None:
    rows = bench.plan(["512", "8, 512"], ["4,2"], ["0", "7"])
    assert [r.name for r in rows] == ["pp512", "pp8", "tg4", "tg2", "tg4 @ d7", "tg2 @ d7"]
    assert len(set(rows)) == len(rows)
    rows = bench.plan(["0"], ["4"], ["0"], ["1,8"])
    assert [r.name for r in rows] == ["tg4", "tg4 x 8"]
    with pytest.raises(ArgumentError, match=r"^sequences: expected 1 to 64"):
        bench.plan(["0"], ["4"], ["0"], ["65"])


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_all_matrices_and_of_the_embedding_only_if_it_is_tied(
    tmp_path: Path, tied: bool
) -> None:
    path = write_tiny(tmp_path / "m.gguf", tie_word_embeddings=tied)
    with open_gguf(path) as file:
        sizes = {t.name: t.size_bytes for t in file.tensors.values()}
        found = bench.bytes_per_step(file.tensors.values())
    norms = sum(n for name, n in sizes.items() if "norm" in name)
    left_out = norms if tied else norms + sizes["token_embd.weight"]
    assert found == sum(sizes.values()) - left_out


def test_help_names_every_synthetic_model(phicore: Callable) -> None:
    shown = " ".join(phicore("bench", "--help").out.split())
    assert all(name in shown for name in MODELS)
