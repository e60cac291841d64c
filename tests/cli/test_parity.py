"""Tests of `phicore parity` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def test_parity_prints_a_row_for_each_backend(phicore: Callable, tiny: Path) -> None:
    result = phicore("parity", "-m", tiny, "-b", "numpy,numpy", "-n", 4, "--prompt", "the sea")
    assert result.code == 0
    header, row = result.out.splitlines()
    assert header.split("  ")[0] == "backend"
    assert row.startswith("numpy against numpy  0.0e+00         0.0e+00   100.0% of ")
    assert row.endswith("none")


def test_parity_beyond_the_bound_has_exit_code_1(phicore: Callable, tiny: Path) -> None:
    args = ("parity", "-m", tiny, "-b", "numpy,numpy", "-n", 0, "--max-error", -1, "--trace")
    result = phicore(*args)
    assert result.code == 1
    assert "(too far)" in result.out
    found = json.loads(phicore(*args, "--json").out)
    assert [row["is_within"] for row in found["comparisons"]] == [False]
    assert found["parts"][0]["operation"] == "embed_tokens"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-b", "numpy"), "phicore: --backends: expected two or more, or one with --against"),
        (("-b", "numpy,nosuch"), "phicore: no backend 'nosuch'"),
        (("-b", "numpy", "--against", "nosuch.npz"), "phicore: nosuch.npz: expected an .npz file"),
    ],
)
def test_parity_errors_are_one_line(
    phicore: Callable, tiny: Path, args: tuple[str, ...], message: str
) -> None:
    result = phicore("parity", "-m", tiny, *args)
    assert result.code in (1, 2)
    assert result.out == ""
    assert result.err.splitlines()[-1].startswith(message)
