"""Tests of weights that a thread loads while others go on."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest

from phicore.engine import loading
from phicore.engine.loading import Weights
from phicore.progress import Progress

FORMS: dict[str, Any] = {"norm": "a form"}
PARAMS: dict[str, Any] = {"norm": "an array"}


def never(what: str, done: int, total: int) -> None:
    raise AssertionError("nobody waits")


def test_weights_that_are_there_are_not_waited_for():
    weights = Weights(PARAMS)
    assert weights.are_loaded
    assert weights.forms is weights.get(never) is PARAMS


def test_get_waits_and_tells_the_caller_s_thread_of_progress(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "TELL_EVERY_S", 0.001)
    half, may_end = threading.Event(), threading.Event()

    def load(report: Progress) -> dict[str, Any]:
        report("loading", 1, 2)
        half.set()
        assert may_end.wait(60)
        report("loading", 2, 2)
        return PARAMS

    weights = Weights(FORMS, load)
    assert half.wait(60)
    assert not weights.are_loaded
    assert weights.forms is FORMS
    told: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append((what, done, total))
        may_end.set()

    before_s = weights.ready_s
    assert weights.get(progress) is PARAMS
    assert (told[0], told[-1]) == (("loading", 1, 2), ("loading", 2, 2))
    assert weights.are_loaded
    assert weights.forms is PARAMS
    assert weights.ready_s > before_s
    assert weights.get(never) is PARAMS


def test_error_of_loading_is_that_of_everybody_who_waits():
    def load(report: Progress) -> dict[str, Any]:
        raise MemoryError("no memory")

    weights = Weights(FORMS, load)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no memory"):
            weights.get(lambda *_: None)


def test_loading_ends_when_nobody_needs_the_weights():
    """A process that gave a model up packed all of its weights before it ended."""
    reported, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def load(report: Progress) -> dict[str, Any]:
        try:
            report("loading", 1, 3)
            reported.set()
            assert go_on.wait(60)
            report("loading", 2, 3)
            raise AssertionError("it goes on")
        finally:
            ended.set()

    weights = Weights(FORMS, load)
    assert reported.wait(60)
    state = weights._loading
    assert state is not None
    del weights
    gc.collect()
    go_on.set()
    assert ended.wait(60)
    with pytest.raises(loading._UnwantedError):
        state.result.result(60)
