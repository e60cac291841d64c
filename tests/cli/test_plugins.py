"""`phicore plugins`, and switching them off."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHICORE_DISABLE_PLUGINS", "")  # the command sets it


def test_plugins_lists_what_each_provides(phicore: Callable) -> None:
    result = phicore("plugins")
    assert result.code == 0
    header, *rows = [line.split() for line in result.out.splitlines()]
    assert header == ["name", "distribution", "version", "status"]
    assert ["numpy", "phicore-numpy", "0.1.0", "backend", "numpy"] in rows


def test_plugins_that_are_switched_off_are_listed(
    phicore: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHICORE_DISABLE_PLUGINS", "numpy")
    rows = {row["name"]: row for row in json.loads(phicore("plugins", "--json").out)}
    assert rows["numpy"]["status"] == "switched off"
    assert phicore("tokenize", "x", "--model", "nosuch").code == 1
    assert "no backend 'numpy'" in phicore("generate", "-b", "numpy", "x").err


def test_no_plugins_keeps_phicore_s_own_backends(phicore: Callable) -> None:
    rows = json.loads(phicore("--no-plugins", "plugins", "--json").out)
    assert "backend numpy" in [row["status"] for row in rows]
