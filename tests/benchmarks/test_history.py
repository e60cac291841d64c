"""Tests of `benchmarks/history.py` and `figures.py`: ratios, noise, and what has become worse."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


def result(commit: str = "abc", **rows: dict[str, list[float]]) -> Any:
    """Make a result whose rows are named for their units, with `_` for `/`."""
    figures = importlib.import_module("figures")
    engines = {name: "" for values in rows.values() for name in values}
    head = {
        "date": "2026-01-01",
        "commit": commit,
        "processor": "P",
        "cpus": 2,
        "threads": 2,
        "file": "m.gguf",
        "size_bytes": 10**9,
        "rounds": 2,
        "bandwidth_bytes_per_s": [3e10, 4e10],
        "others_share": 0.0,
        "engines": engines,
        "left_out": [],
    }
    made = [figures.Row(name, name.replace("_", "/"), values) for name, values in rows.items()]
    return figures.Result(head, made)


def speeds(theirs: list[float], ours: list[float]) -> dict[str, list[float]]:
    return {"llama.cpp": theirs, "phicore jax": ours}


def worse(now: Any, *before: Any, tmp_path: Path) -> list[Any]:
    history = importlib.import_module("history")
    path = tmp_path / "history.jsonl"
    for one in before:
        history.append(path, one)
    return history.worse(now, history.read(path))


def test_slower_machine_is_not_a_slower_commit(tmp_path: Path):
    before = result(tokens_s=speeds([10, 11], [20, 22]))
    now = result(tokens_s=speeds([5, 4], [10, 8]))
    assert worse(now, before, tmp_path=tmp_path) == []


def test_slower_commit_is_seen_on_a_faster_machine(tmp_path: Path):
    before = result("old", tokens_s=speeds([10, 11], [20, 22]))
    now = result(tokens_s=speeds([20, 20], [34, 35]))
    [found] = worse(now, before, tmp_path=tmp_path)
    assert (found.row, found.engine, found.commits) == ("tokens_s", "phicore jax", "old")
    assert (found.now, found.before) == (pytest.approx(1.725), pytest.approx(2.0))
    assert str(found).startswith("tokens_s, phicore jax: the ratio is 1.73, and was 2 (old)")


def test_faster_commit_is_not_worse(tmp_path: Path):
    before = result(tokens_s=speeds([10], [20]), s=speeds([1.0], [2.0]))
    now = result(tokens_s=speeds([10], [30]), s=speeds([1.0], [1.0]))
    assert worse(now, before, tmp_path=tmp_path) == []


def test_seconds_and_errors_are_worse_if_they_grow(tmp_path: Path):
    before = result(s=speeds([1.0], [2.0]), error=speeds([1e-2], [1e-5]))
    now = result(s=speeds([1.0], [2.5]), error=speeds([1e-2], [2e-5]))
    found = worse(now, before, tmp_path=tmp_path)
    assert [(one.row, one.what) for one in found] == [("s", "the ratio"), ("error", "the figure")]


def test_difference_within_the_spread_of_rounds_is_noise(tmp_path: Path):
    before = result(tokens_s=speeds([10, 10], [16, 24]))  # +- 20 % within this run
    now = result(tokens_s=speeds([10, 10], [17.5, 17.5]))
    assert worse(now, before, tmp_path=tmp_path) == []
    quiet = result(tokens_s=speeds([10, 10], [20, 20]))
    assert len(worse(now, *[quiet] * 5, tmp_path=tmp_path)) == 1  # the newest five runs count


@pytest.mark.parametrize("name", ["processor", "file", "threads"])
def test_runs_of_another_kind_are_not_compared(tmp_path: Path, name: str):
    before = result(tokens_s=speeds([10], [20]))
    before.head[name] = "another"
    assert worse(result(tokens_s=speeds([10], [10])), before, tmp_path=tmp_path) == []


def test_line_that_is_no_run_is_named(tmp_path: Path):
    history = importlib.import_module("history")
    path = tmp_path / "history.jsonl"
    history.append(path, result(tokens_s=speeds([10], [20])))
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(ValueError, match=r"history\.jsonl: line 2 is no run of peers\.py"):
        history.read(path)


def test_ratio_is_the_median_of_the_rounds_ratios():
    figures = importlib.import_module("figures")
    row = result(tokens_s=speeds([1, 2, 4], [2, 2, 2])).rows[0]
    assert row.ratios("llama.cpp") == {"phicore jax": [2, 1, 0.5]}
    slow = figures.Row("x", "s", speeds([1, 2, 4], [6]))  # not repeated, since it was slow
    assert slow.ratios("llama.cpp") == {"phicore jax": [3]}


def test_table_has_each_engine_and_its_ratio():
    figures = importlib.import_module("figures")
    found = result(tokens_s=speeds([10, 30], [30, 30]), error=speeds([2e-2], [1e-4]))
    assert figures.cells(found, with_spans=False) == [
        ["", "llama.cpp", "phicore jax", "ratio"],
        ["tokens_s, tokens/s", "20.0", "30.0", "2.00"],
        ["error", "2.0e-02", "1.0e-04", "5.0e-03"],
    ]
    assert figures.cells(found, with_spans=True)[1][1:] == [
        "20.0 (10.0 to 30.0)",
        "30.0",
        "2.00 (1.00 to 3.00)",
    ]
    lines = figures.markdown(found, with_spans=False).splitlines()
    assert lines[0].startswith("m.gguf, 1.00 GB, at commit abc; P, 2 CPUs, 2 threads, memory 35 ")
    assert lines[2:4] == ["| | llama.cpp | phicore jax | ratio |", "| --- | --- | --- | --- |"]


def test_results_of_one_file_are_joined():
    figures = importlib.import_module("figures")
    parts = [result(tokens_s=speeds([10], [20])), result("def", s=speeds([1], [2]))]
    other = result(error=speeds([1], [2]))
    other.head["file"] = "other.gguf"
    [joined, alone] = figures.merged([*parts, other])
    assert [row.name for row in joined.rows] == ["tokens_s", "s"]
    assert alone.head["file"] == "other.gguf"
    again = figures.Result.from_data(joined.as_data())
    assert (again.head, again.rows) == (joined.head, joined.rows)


def test_document_without_marks_is_refused():
    figures = importlib.import_module("figures")
    with pytest.raises(ValueError, match="it needs the lines"):
        figures.replaced("a document\n", "table")
