"""Tests of `phicore conformance`, the conformance kit on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from phicore_numpy.backend import NumpyBackend

from phicore.backend import Array


class Faulty(NumpyBackend):
    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        return super().rope(x, cos, -sin)


def test_conformance_counts_the_tests_of_each_part(phicore: Callable) -> None:
    result = phicore("conformance", "-b", "numpy", "-k", "rms_norm or layer_norm")
    assert result.code == 0
    header, *rows = [line.split() for line in result.out.splitlines()]
    assert header == ["part", "passed", "failed", "skipped"]
    assert rows == [["operations", "2", "0", "0"]]


def test_conformance_names_what_failed(phicore: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phicore_numpy.backend.NumpyBackend", Faulty)
    result = phicore("conformance", "-b", "numpy", "-k", "rope_equals")
    assert result.code == 1
    assert "FAILED operations: test_rope_equals_complex_rotation[full]" in result.out
    assert "shape (2, 3, 5, 8): relative error" in result.out
    found = json.loads(phicore("conformance", "-b", "numpy", "-k", "rope_equals", "--json").out)
    assert [r["outcome"] for r in found["results"]] == ["failed"] * 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-b", "nosuch"), "phicore: no backend 'nosuch'"),
        (("-b", "numpy", "--device", "cuda"), "phicore: backend numpy: no device 'cuda'"),
        (("-b", "numpy", "-k", "nosuch"), "phicore: conformance: no test fits 'nosuch'"),
    ],
)
def test_conformance_errors_are_one_line(
    phicore: Callable, args: tuple[str, ...], message: str
) -> None:
    result = phicore("conformance", *args)
    assert result.code == 1
    assert result.out == ""
    assert result.err.splitlines()[-1].startswith(message)


def test_conformance_tells_each_failure_at_once(
    phicore: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("phicore_numpy.backend.NumpyBackend", Faulty)
    result = phicore("conformance", "-b", "numpy", "-k", "rope_equals")
    told = [line for line in result.err.splitlines() if line.startswith("failed: operations: ")]
    assert len(told) == 3
    first = phicore("conformance", "-b", "numpy", "-k", "rope_equals", "-x")
    assert (first.code, first.out.count("FAILED")) == (1, 1)


def test_conformance_of_a_part(phicore: Callable) -> None:
    result = phicore("conformance", "-b", "numpy", "-k", "operations and norm")
    assert result.out.splitlines()[1].split() == ["operations", "2", "0", "0"]
