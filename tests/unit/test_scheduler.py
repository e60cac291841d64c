"""Tests of the scheduler, which needs no backend."""

from __future__ import annotations

import pytest

from phicore import PhicoreError
from phicore.engine import Request, Sequence
from phicore.engine.drafts import Draft, Outlook, Plan
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


# ---- drafts --------------------------------------------------------------------------------------


def measured_steps(rows: int, **seconds: float) -> Scheduler:
    scheduler = Scheduler()
    for size, took_s in seconds.items():
        for _ in range(60):
            scheduler.step_took(rows, int(size[1:]), took_s, is_drawn=False)
    return scheduler


LONG = (1,) * 7


def test_nothing_is_checked_before_a_step_was_measured():
    assert Scheduler().step_wanted(1, 8, [Draft(LONG, 1.0)]) == 1


def test_nothing_is_checked_without_drafts():
    assert measured_steps(1, t1=1.0).step_wanted(1, 8, [Draft((), 1.0)]) == 1


@pytest.mark.parametrize(
    ("chance", "size"), [(0.0, 1), (0.2, 1), (0.4, 2), (0.8, 4), (0.99, 8), (1.0, 8)]
)
def test_more_is_checked_the_better_the_draft_is(chance: float, size: int):
    scheduler = measured_steps(1, t1=1.0, t2=1.2, t4=1.5, t8=2.6)
    assert scheduler.step_wanted(1, 8, [Draft(LONG, chance)]) == size


def test_a_short_draft_takes_a_short_step():
    scheduler = measured_steps(1, t1=1.0, t2=1.2, t4=1.5, t8=2.6)
    assert scheduler.step_wanted(1, 8, [Draft((1,), 1.0)]) == 2
    assert scheduler.step_wanted(1, 3, [Draft(LONG, 1.0)]) == 2
    assert scheduler.step_wanted(1, 1, [Draft(LONG, 1.0)]) == 1


def test_nothing_is_checked_where_it_costs_as_much_as_it_gives():
    scheduler = measured_steps(2, t1=1.0, t2=1.95, t4=3.9, t8=7.9)
    assert scheduler.step_wanted(2, 8, [Draft(LONG, 1.0)] * 2) == 1


def test_steps_that_draw_have_their_own_times():
    scheduler = measured_steps(1, t1=1.0, t2=1.2, t4=1.5, t8=2.6)
    for size, took_s in {1: 1.0, 2: 1.9, 4: 3.7, 8: 7.3}.items():
        for _ in range(60):
            scheduler.step_took(1, size, took_s, is_drawn=True)
    good = [Draft(LONG, 0.9)]
    assert scheduler.step_wanted(1, 8, good) > 1
    assert scheduler.step_wanted(1, 8, good, is_drawn=True) == 1


def test_rows_without_a_draft_count():
    scheduler = measured_steps(4, t1=1.0, t2=1.3, t4=2.0)
    good, none = Draft(LONG, 0.9), Draft()
    assert scheduler.step_wanted(4, 8, [good] * 4) == 4
    assert scheduler.step_wanted(4, 8, [good, none, none, none]) == 1


@pytest.mark.parametrize(("token_s", "size"), [(0.0, 8), (0.1, 4), (0.5, 4), (0.8, 1)])
def test_drafts_that_take_time_are_checked_if_they_still_pay(token_s: float, size: int):
    scheduler = measured_steps(1, t1=1.0, t2=1.2, t4=1.4, t8=2.4)
    assert scheduler.step_wanted(1, 8, [Outlook(7, 0.95)], token_s=token_s) == size


def test_plan_that_gives_most_in_the_same_time_is_chosen():
    scheduler = measured_steps(1, t1=1.0, t2=1.2, t4=1.5, t8=2.6)
    sequence = Sequence(Request([1]), 99, "length", False)

    def plan(length: int, chance: float, token_s: float) -> Plan:
        return Plan({sequence: Outlook(length, chance)}, lambda _: {}, token_s)

    free, good, slow = plan(7, 0.6, 0.0), plan(7, 0.9, 0.1), plan(7, 1.0, 1.0)
    assert scheduler.plan_wanted(1, 8, [sequence], [free, good, slow]) == (4, good)
    assert scheduler.plan_wanted(1, 8, [sequence], [free, slow]) == (4, free)
    assert scheduler.plan_wanted(1, 8, [sequence], [plan(0, 0.0, 0.0), slow]) == (1, None)
    assert scheduler.plan_wanted(1, 8, [sequence], []) == (1, None)
    other = Sequence(Request([1]), 99, "length", False)
    assert Scheduler().plan_wanted(1, 8, [other], [free, good]) == (1, None)


def test_many_rows_check_few_tokens_or_none():
    assert [Scheduler.step_sizes(rows) for rows in (1, 2, 4, 8, 12)] == [
        (2, 4, 8),
        (2, 4, 8),
        (2, 4),
        (2,),
        (),
    ]


def test_one_slow_step_is_forgotten():
    scheduler = measured_steps(1, t1=1.0, t2=30.0, t4=30.0, t8=30.0)
    tried = [scheduler.step_wanted(1, 8, [Draft(LONG, 1.0)]) for _ in range(1600)]
    assert tried[0] == 1
    assert tried[-1] == 8


def test_times_are_averaged_and_one_long_time_counts_in_part():
    scheduler = measured_steps(1, t1=1.0)
    scheduler.step_took(1, 1, 2.0)
    assert scheduler.steps_s[1, 1, False] == pytest.approx(1.3)
    scheduler = measured_steps(1, t1=1.0)
    scheduler.step_took(1, 1, 1000.0)
    assert scheduler.steps_s[1, 1, False] == pytest.approx(1.6)
    for _ in range(30):
        scheduler.step_took(1, 1, 0.5)
    assert scheduler.steps_s[1, 1, False] == pytest.approx(0.5, rel=1e-3)


def test_first_time_of_a_size_counts_unless_it_is_far_too_long():
    scheduler = measured_steps(1, t1=1.0)
    scheduler.step_took(1, 4, 1.5)
    assert scheduler.steps_s[1, 4, False] == 1.5
    scheduler.step_took(1, 8, 100.0)
    assert scheduler.steps_s[1, 8, False] == pytest.approx(3 * 2.75)
