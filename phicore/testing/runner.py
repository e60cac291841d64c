"""Runs the conformance kit on a backend that has no test module of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phicore.backend import Backend, BackendOptions
from phicore.errors import PhicoreError
from phicore.extras import check
from phicore.progress import Progress


@dataclass(frozen=True)
class Result:
    """The result of a test.

    Attributes:
        part: The part of the kit, such as `attention`.
        name: The name of the test.
        outcome: "passed", "failed" or "skipped".
        message: The reason if the test failed or was skipped, otherwise "".
    """

    part: str
    name: str
    outcome: str
    message: str = ""


def run(
    make: Callable[[BackendOptions], Backend],
    *,
    keyword: str = "",
    stop_at_first: bool = False,
    progress: Progress = lambda *_: None,
    failed: Callable[[Result], None] = lambda _: None,
) -> list[Result]:
    """Run the kit and return the result of each test.

    Args:
        make: Makes a new backend at each call.
        keyword: An expression for `pytest -k` that selects tests by their names and parts.
        stop_at_first: Whether to stop after the first test that fails.
        progress: Called with the number of tests that are done.
        failed: Called with the result of each test that fails, as soon as it is known.
    Raises:
        PhicoreError: If pytest or hypothesis is missing, or if the expression is malformed or
            selects no test.
    """
    check("testing", "the conformance kit")
    import pytest

    from phicore.testing import installed

    collector = _Collector(progress, failed)
    # Configuration files in the user's folder must have no influence.
    arguments = [installed.__file__, "-c", os.devnull, "--rootdir", str(Path(__file__).parent)]
    for unwanted in ("terminal", "cacheprovider", "xdist"):
        arguments += ["-p", f"no:{unwanted}"]
    installed.factory = make
    try:
        stop = ["--exitfirst"] if stop_at_first else []
        code = pytest.main([*arguments, *stop, "-k", keyword], plugins=[collector])
    finally:
        installed.factory = None
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise PhicoreError(f"conformance: no test fits {keyword!r}")
    if code == pytest.ExitCode.INTERRUPTED and not collector.results:
        raise KeyboardInterrupt
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise PhicoreError(f"conformance: pytest could not run ({code!r}); is {keyword!r} right?")
    return collector.results


class _Collector:
    """A pytest plugin that records the result of each test."""

    def __init__(self, progress: Progress, failed: Callable[[Result], None]) -> None:
        self.results: list[Result] = []
        self._progress = progress
        self._failed = failed
        self._parts: dict[str, str] = {}
        self._count = 0

    def pytest_itemcollected(self, item: Any) -> None:
        part = item.function.__module__.rpartition(".")[2]
        item.extra_keyword_matches.add(part)
        self._parts[item.nodeid] = part

    def pytest_collection_finish(self, session: Any) -> None:
        self._count = len(session.items)
        self._progress("testing", 0, self._count)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.rpartition("::")[2]
        message = "" if report.outcome == "passed" else _message(report)
        part = self._parts.get(report.nodeid, "")
        self.results.append(Result(part, name, report.outcome, message))
        if report.outcome == "failed":
            self._failed(self.results[-1])
        self._progress("testing", len(self.results), self._count)


def _message(report: Any) -> str:
    """Return the exception of a failed test, or the reason of a skip, in one line."""
    found = report.longrepr
    if isinstance(found, tuple):  # a skipped test: file, line, reason
        return str(found[2]).removeprefix("Skipped: ")
    crash = getattr(found, "reprcrash", None)
    lines = str(crash.message if crash is not None else found).strip().splitlines()
    kept = [line.strip() for line in lines if line.strip()]
    return "; ".join(kept[:3]) if kept else "failed"


def parts_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Count how many tests of each part passed, failed and were skipped."""
    counts: dict[str, dict[str, Any]] = {}
    for result in results:
        row = counts.setdefault(
            result.part, {"part": result.part, "passed": 0, "failed": 0, "skipped": 0}
        )
        row[result.outcome] += 1
    return list(counts.values())
