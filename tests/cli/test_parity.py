"""Tests of `phicore parity` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
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
        (
            ("-b", "numpy", "--against", "nosuch.npz"),
            "phicore: --against: nosuch.npz: No such file",
        ),
        (
            ("-b", "numpy", "--against", __file__),
            f"phicore: --against: {__file__}: expected an .npz",
        ),
    ],
)
def test_parity_errors_are_one_line(
    phicore: Callable, tiny: Path, args: tuple[str, ...], message: str
) -> None:
    result = phicore("parity", "-m", tiny, *args)
    assert result.code in (1, 2)
    assert result.out == ""
    assert result.err.splitlines()[-1].startswith(message)


@pytest.mark.parametrize("kind", ["cut", "other arrays", "one array", "objects"])
def test_parity_with_a_reference_of_another_kind_is_one_line(
    phicore: Callable, tiny: Path, tmp_path: Path, kind: str
) -> None:
    """NumPy raises errors of six classes for these, and advises to unpickle the file."""
    path, ids = tmp_path / "reference.npz", np.zeros(2, dtype=object if kind == "objects" else int)
    np.savez(path, token_ids=ids, logits=np.zeros((2, 3)), greedy_ids=np.zeros(1, dtype=int))
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "other arrays":
        np.savez(path, ids=ids)
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, ids)
    result = phicore("parity", "-m", tiny, "-b", "numpy", "--against", path)
    assert result.code == 2
    assert result.err.splitlines()[-1] == (
        f"phicore: --against: {path}: expected an .npz file with token_ids, logits, greedy_ids"
    )


def test_parity_tells_of_each_backends_texts(phicore: Callable, tiny: Path) -> None:
    """They may take minutes, in which nothing was shown."""
    result = phicore("parity", "-m", tiny, "-b", "numpy,numpy", "-n", 2, "--prompt", "Hello")
    assert result.code == 0
    assert len([line for line in result.err.splitlines() if "numpy: greedy texts: " in line]) == 2
