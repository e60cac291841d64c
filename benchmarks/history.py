"""The history of `peers.py`: figures by processor, one run in a line, and what has become worse.

A machine that others share changes its speed by half from one minute to the next, so plain speeds
of different runs say little. What is compared are figures that such a minute does not change:
ratios to llama.cpp in the same run, errors of logits, memory in sizes of the file, and the speed-up
of several sequences over one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import Result, Row

LAST = 5
"""How many earlier runs a run is compared with, the newest ones."""
LEAST_NOISE = 0.05
"""Ratios of quiet runs of one commit differ by up to this much."""
COMPARABLE = ("error", "file", "x")
"""Units of figures that are compared as they are; others are compared by their ratios."""
KEY = ("processor", "file", "threads", "base")
"""What must be the same in runs that are compared."""


@dataclass(frozen=True)
class Worse:
    """A figure that is worse than it was: its median now and before, and the noise of both."""

    row: str
    engine: str
    what: str
    now: float
    before: float
    noise: float
    commits: str

    def __str__(self) -> str:
        return (
            f"{self.row}, {self.engine}: {self.what} is {self.now:.3g}, and was {self.before:.3g} "
            f"({self.commits}); the noise of these runs is {self.noise:.0%}"
        )


def entry(result: Result) -> dict[str, Any]:
    """Return the line of a run in the history, as plain data.

    `figures` has `[median, least, greatest, unit]` by row, engine and kind (`value` or `ratio`).
    """
    figures: dict[str, dict[str, Any]] = {}
    for row in result.rows:
        ratios = row.ratios(result.base)
        figures[row.name] = {
            "unit": row.unit,
            "values": {name: _spread(values) for name, values in row.values.items() if values},
            "ratios": {name: _spread(values) for name, values in ratios.items() if values},
        }
    head = result.head
    names = ("date", "commit", "processor", "cpus", "threads", "file", "engines")
    bandwidth = float(np.median(head["bandwidth_bytes_per_s"]))
    return {
        **{name: head[name] for name in names},
        "base": result.base,
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "figures": figures,
    }


def _spread(values: Sequence[float]) -> list[float]:
    return [float(f"{x:.5g}") for x in (float(np.median(values)), min(values), max(values))]


def read(path: Path) -> list[dict[str, Any]]:
    """Read a history, the oldest run first. A file that is not there is an empty history.

    Raises:
        ValueError: If a line is not a run; the message names it.
    """
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            run = json.loads(line)
            found.append({**run, "figures": dict(run["figures"])})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: line {number} is no run of peers.py") from None
    return found


def append(path: Path, result: Result) -> None:
    """Add a run as the last line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry(result), ensure_ascii=False) + "\n")


def compared_with(result: Result, history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs that a result is compared with: the newest of the same kind, oldest first."""
    new = entry(result)
    return [old for old in history if all(old.get(key) == new[key] for key in KEY)][-LAST:]


def worse(result: Result, history: Iterable[dict[str, Any]]) -> list[Worse]:
    """Return the figures that are worse than the history's, beyond the noise.

    The noise is the largest of `LEAST_NOISE`, half of the spread of the rounds of this run and of
    the median run before, and half of the spread of the medians before. An error is worse if it is
    larger by more than `LEAST_NOISE`.
    """
    earlier = compared_with(result, history)
    new = entry(result)["figures"]
    found = []
    for row in result.rows:
        kind = "values" if row.unit in COMPARABLE else "ratios"
        for engine, spread in new[row.name][kind].items():
            runs = [
                (run["figures"][row.name][kind][engine], run["commit"])
                for run in earlier
                if engine in run["figures"].get(row.name, {}).get(kind, {})
            ]
            if runs and (one := _compared(row, engine, kind, spread, runs)):
                found.append(one)
    return found


def _compared(
    row: Row,
    engine: str,
    kind: str,
    spread: Sequence[float],
    runs: Sequence[tuple[Sequence[float], str]],
) -> Worse | None:
    medians = [old[0] for old, _ in runs]
    now, before = spread[0], float(np.median(medians))
    if before <= 0:
        return None
    noise = LEAST_NOISE
    if row.unit != "error":
        within = float(np.median([(old[2] - old[1]) / 2 for old, _ in runs])) / before
        own = (spread[2] - spread[1]) / 2 / now
        noise = max(noise, within, own, (max(medians) - min(medians)) / 2 / before)
    change = now / before if not row.is_more_better else before / now
    if change <= 1 + noise:
        return None
    commits = list(dict.fromkeys(commit for _, commit in runs))
    what = "the ratio" if kind == "ratios" else "the figure"
    return Worse(row.name, engine, what, now, before, noise, ", ".join(commits))
