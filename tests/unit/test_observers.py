"""Tests of observers of generations: when they are called, and that failures stop nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from api.tiny_models import write_tiny
from unit.throwaway import Install, install

from phicore import load
from phicore.plugins import Plugins

__all__ = ["install"]

WATCH = """
    from phicore import hookimpl

    calls = []

    @hookimpl
    def phicore_generation_started(generation):
        calls.append(("started", generation.prompt_ids))

    @hookimpl
    def phicore_piece_generated(piece):
        calls.append(("piece", piece.token_id))

    @hookimpl
    def phicore_generation_ended(generation, error):
        calls.append(("ended", generation.timings.generated_tokens, error))
"""
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf")


def calls_of(module: str) -> list:
    import importlib

    return importlib.import_module(module).calls


def test_observers_see_the_start_each_token_and_the_end(install: Install, tiny: Path):
    install("watcher", "watcher", WATCH)
    with load(tiny, backend="numpy") as model:
        generation = model.generate([1, 2], max_tokens=3, **GREEDY)
        calls = calls_of("throwaway_watcher")
        assert calls == []  # no token was asked for yet
        tokens = [piece.token_id for piece in generation]
    assert calls == [("started", [1, 2]), *[("piece", t) for t in tokens], ("ended", 3, None)]


def test_observers_see_the_end_of_a_generation_that_is_closed_early(install: Install, tiny: Path):
    install("watcher", "watcher", WATCH)
    with load(tiny, backend="numpy") as model:
        generation = model.generate([1, 2], max_tokens=9, **GREEDY)
        next(generation)
        generation.close()
    assert [call[0] for call in calls_of("throwaway_watcher")] == ["started", "piece", "ended"]
    assert calls_of("throwaway_watcher")[-1][2] is None


def test_observers_see_an_error(install: Install, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    install("watcher", "watcher", WATCH)
    with load(tiny, backend="numpy") as model:
        generation = model.generate([1, 2], max_tokens=9, **GREEDY)
        next(generation)
        monkeypatch.setattr("phicore.network.graph.mlp", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generation.text()
    name, _, error = calls_of("throwaway_watcher")[-1]
    assert name == "ended"
    assert isinstance(error, ZeroDivisionError)


def test_observer_that_fails_is_told_once_and_stops_nothing(
    install: Install, tiny: Path, caplog: pytest.LogCaptureFixture
):
    install("faulty", "faulty", WATCH.replace('calls.append(("piece", piece.token_id))', "1 / 0"))
    install("watcher", "watcher", WATCH)
    with load(tiny, backend="numpy") as model, caplog.at_level(logging.ERROR):
        assert len(list(model.generate([1, 2], max_tokens=4, **GREEDY))) == 4
    assert len(calls_of("throwaway_watcher")) == 6
    assert calls_of("throwaway_faulty") == [("started", [1, 2])]
    [record] = caplog.records
    assert record.getMessage() == (
        "faulty:faulty: phicore_piece_generated failed; it is not called again"
    )


def test_plugins_lists_observers(install: Install):
    assert Plugins().observers() is None
    install("watcher", "watcher", WATCH)
    [info] = [info for info in Plugins().installed() if info.name == "watcher"]
    assert info.provides == ("observer",)
