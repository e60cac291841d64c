"""Tests of the times of a generation."""

import time

import pytest

from phicore.engine.timings import Timings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list whose only number is the time."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_times_of_prompt_answer_and_reading_again_are_apart(clock: list[float]) -> None:
    timings = Timings()
    timings.start(10)
    clock[0], timings.compile_s = 103.0, 1.0  # one second of compiling, two of reading
    timings.count_token()
    assert (timings.prompt_s, timings.first_token_s) == (2.0, 3.0)
    clock[0] = 104.0
    timings.count_token()
    timings.start_again()
    clock[0], timings.compile_s = 110.0, 3.0  # two seconds of compiling, four of reading
    timings.count_token()
    clock[0] = 111.0
    timings.count_token()
    assert timings.again_s == 4.0
    assert timings.decode_s == 2.0
    assert timings.decode_tokens_per_s == 1.5
    assert timings.prompt_tokens_per_s == 5.0


def test_times_without_an_answer_are_zero() -> None:
    timings = Timings()
    assert (timings.prompt_tokens_per_s, timings.decode_tokens_per_s) == (0.0, 0.0)
