"""Tests of the scheduler, which needs no backend."""

from __future__ import annotations

import pytest

from phicore import PhicoreError
from phicore.engine import Request, Sequence
from phicore.engine.scheduler import BUDGET_S, PATIENCE, SIZES, Scheduler


def sequence() -> Sequence:
    return Sequence(Request([1]), 1, "length", is_long=False)


def test_first_come_first_served_within_the_rows():
    scheduler, sequences = Scheduler(max_sequences=2), [sequence() for _ in range(3)]
    for each in sequences:
        scheduler.add(each)
    assert scheduler.next_to_read(0) is sequences[0]
    assert scheduler.next_to_read(1) is sequences[1]
    assert scheduler.next_to_read(2) is None
    assert scheduler.next_to_read(1) is sequences[2]
    assert scheduler.next_to_read(0) is None


def test_short_prompt_does_not_wait_for_a_long_one_nor_the_long_one_for_ever():
    long, short = (Sequence(Request([1] * n), 1, "length", is_long=False) for n in (2000, 20))
    scheduler, turns = Scheduler(), []
    for _ in range(8):
        turns.append(scheduler.next_chunk([long, short]))
    assert turns == [1, 1, 1, 0, 1, 1, 1, 0]
    equal = [Sequence(Request([1] * 50), 1, "length", is_long=False) for _ in range(3)]
    equal[0].computed = 16
    assert Scheduler().next_chunk(equal) == 0  # the first to come is read first
    assert Scheduler().next_chunk(equal[1:]) == 0


def test_too_many_that_wait_are_refused():
    scheduler = Scheduler(max_waiting=1)
    scheduler.add(sequence())
    with pytest.raises(PhicoreError, match=r"^1 requests are waiting already; try again later$"):
        scheduler.add(sequence())


def test_tokens_of_a_chunk_fit_the_budget():
    scheduler = Scheduler()
    assert scheduler.most_tokens(0) is None  # nobody waits meanwhile
    assert scheduler.most_tokens(1) == 1  # nothing is known yet
    scheduler.measured(16, 16 * BUDGET_S / 50)
    assert scheduler.most_tokens(1) == 50
    for _ in range(50):  # the machine is slower now
        scheduler.measured(16, 16 * 2 * BUDGET_S)
    assert scheduler.most_tokens(3) == 1
    assert scheduler.most_tokens(0) is None


def test_prompt_that_is_read_alone_comes_in_parts_of_about_the_time_that_is_set():
    scheduler = Scheduler()
    scheduler.chunk_s = 2.0
    assert scheduler.most_tokens(0) is None  # nothing is known yet
    scheduler.measured(10, 1.0)
    assert scheduler.most_tokens(0) == 20
    assert scheduler.most_tokens(1) == 1


def test_rows_grow_at_once_and_shrink_with_patience():
    wanted = Scheduler.rows_wanted
    assert [wanted(1, n, 0) for n in (1, 2, 5, 7, 9)] == [1, 2, 6, 8, 12]
    assert wanted(8, 5, 0) == 8
    assert wanted(8, 5, PATIENCE) == 6
    assert wanted(8, 4, 0) == 4  # half of it
    assert wanted(8, 8, PATIENCE) == 8
    assert all(wanted(size, size, 0) == size for size in SIZES)
