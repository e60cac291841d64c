"""The figures of `peers.py`: rows of values of several engines, their ratios, and tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BASE = "llama.cpp"
"""The peer that ratios refer to, where it takes part."""

MORE_IS_BETTER = {"tokens/s": True, "share": True, "x": True}
"""Units of which more is better; of all others less is."""


@dataclass(frozen=True)
class Row:
    """One measurement of all engines: a value for each round.

    Attributes:
        name: What was measured.
        unit: tokens/s, s, share (of the memory's bandwidth), x (times one sequence), least (times
            the least time that the bandwidth allows), file (memory, in sizes of the file) or
            error.
        values: The values of each engine that has been measured.
    """

    name: str
    unit: str
    values: dict[str, list[float]]

    @property
    def is_more_better(self) -> bool:
        return MORE_IS_BETTER.get(self.unit, False)

    def ratios(self, base: str) -> dict[str, list[float]]:
        """Return the ratio of each engine to a base in each round; none if the base has no values.

        An engine that was slow has fewer rounds, whose ratio is taken to the base's median.
        """
        theirs = self.values.get(base)
        if not theirs or not all(theirs):
            return {}
        middle = float(np.median(theirs))
        return {
            name: [
                value / (theirs[i] if len(ours) == len(theirs) else middle)
                for i, value in enumerate(ours)
            ]
            for name, ours in self.values.items()
            if name != base
        }


@dataclass(frozen=True)
class Result:
    """A run: what it was measured with, and its rows.

    Attributes:
        head: Facts in plain data: `date`, `commit`, `processor`, `cpus`, `threads`, `file`,
            `size_bytes`, `bandwidth_bytes_per_s` (samples), `others_share`, `engines` (a line about
            each) and `left_out` (lines).
        rows: The figures.
    """

    head: dict[str, Any]
    rows: list[Row]

    @property
    def engines(self) -> list[str]:
        return list(self.head["engines"])

    @property
    def base(self) -> str:
        return BASE if BASE in self.engines else self.engines[0]

    def as_data(self) -> dict[str, Any]:
        rows = [
            asdict(row) | {"ratios": {n: _median(r) for n, r in row.ratios(self.base).items()}}
            for row in self.rows
        ]
        return {**self.head, "base": self.base, "rows": rows}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Result:
        head = {name: value for name, value in data.items() if name not in ("rows", "base")}
        rows = [Row(row["name"], row["unit"], row["values"]) for row in data["rows"]]
        return cls(head, rows)


def merged(results: Sequence[Result]) -> list[Result]:
    """Join the results of one file, processor and number of threads; a later row replaces an
    earlier one of the same name.

    Figures of different minutes are only comparable by their ratios.
    """
    found: dict[tuple[Any, ...], Result] = {}
    for result in results:
        key = tuple(result.head[name] for name in ("file", "processor", "threads"))
        if key not in found:
            found[key] = result
            continue
        old = found[key]
        rows = {row.name: row for row in (*old.rows, *result.rows)}
        joined = {
            "engines": {**old.head["engines"], **result.head["engines"]},
            "bandwidth_bytes_per_s": [
                *old.head["bandwidth_bytes_per_s"],
                *result.head["bandwidth_bytes_per_s"],
            ],
            "left_out": list(dict.fromkeys([*old.head["left_out"], *result.head["left_out"]])),
        }
        found[key] = Result({**result.head, **joined}, list(rows.values()))
    return list(found.values())


def figure(value: float, unit: str) -> str:
    """Format one value."""
    if not math.isfinite(value):
        return str(value)
    if unit == "share":
        return f"{value:.0%}"
    if unit == "error":
        return f"{value:.1e}"
    if unit in ("file", "x", "least"):
        return f"{value:.2f}"
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def title(row: Row) -> str:
    """Return the name of a row with its unit, where the name does not say it."""
    return (
        row.name
        if row.unit in ("share", "error", "x", "file", "least")
        else (f"{row.name}, {row.unit}")
    )


def cells(result: Result, *, with_spans: bool) -> list[list[str]]:
    """Return the table: a line of columns, then a line for each row.

    Each engine but the base has a second column, its ratio to the base. A cell is a median, with
    the least and the greatest value of the rounds if `with_spans`.
    """
    base, names = result.base, result.engines
    names = [base, *(name for name in names if name != base)]
    columns = ["", *(c for name in names for c in ([name] if name == base else [name, "ratio"]))]
    lines = [columns]
    for row in result.rows:
        ratios = row.ratios(base)
        line = [title(row)]
        for name in names:
            values, unit = row.values.get(name), row.unit
            line.append(_span(values, lambda v, unit=unit: figure(v, unit), with_spans))
            if name != base:
                form = "{:.1e}".format if unit == "error" else "{:.2f}".format
                line.append(_span(ratios.get(name), form, with_spans))
        lines.append(line)
    return lines


def _span(values: list[float] | None, form: Callable[[float], str], with_spans: bool) -> str:
    if not values:
        return ""
    middle, least, most = map(form, (_median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})" if with_spans and least != most else middle


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def about(result: Result) -> list[str]:
    """Return lines that say what a result was measured with."""
    head = result.head
    low, middle, high = np.percentile(head["bandwidth_bytes_per_s"], [0, 50, 100]) / 1e9
    return [
        f"{head['file']}, {head['size_bytes'] / 1e9:.2f} GB, at commit {head['commit']}",
        f"{head['processor']}, {head['cpus']} CPUs, {head['threads']} threads, memory "
        f"{middle:.0f} GB/s ({low:.0f} to {high:.0f}), read by all CPUs; other processes took "
        f"{head['others_share']:.0%} of the CPUs",
        *(f"{name}: {line}" for name, line in head["engines"].items()),
        *(f"left out: {line}" for line in head["left_out"]),
        f"medians of {head['rounds']} rounds",
    ]


def markdown(result: Result, *, with_spans: bool) -> str:
    """Return a paragraph that says what was measured, and a table in Markdown."""
    first, *lines = cells(result, with_spans=with_spans)
    table = [first, ["---"] * len(first), *lines]
    rows = "\n".join(f"| {' | '.join(line)} |".replace("|  ", "| ") for line in table)
    return "; ".join(about(result)) + ".\n\n" + rows + "\n"


def replaced(text: str, content: str) -> str:
    """Return a document whose part between the two marks is replaced.

    Raises:
        ValueError: If the document does not have the marks, each on a line of its own.
    """
    start, end = "<!-- peers.py -->\n", "<!-- end of peers.py -->\n"
    before, has_start, rest = text.partition(start)
    _, has_end, after = rest.partition(end)
    if not has_start or not has_end:
        raise ValueError(f"it needs the lines {start.strip()!r} and {end.strip()!r}")
    return f"{before}{start}{content}{end}{after}"
