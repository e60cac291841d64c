"""Drafts of n-grams, and which of the sampled tokens are the text."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.engine import Request, Sequence
from phicore.engine.drafts import NO_DRAFT, Draft, Match, NGrams, accepted, inputs_of
from phicore.engine.forced import Forced
from phicore.engine.scheduler import STEP_SIZES, Scheduler
from phicore.network.processors import LogitsProcessor

TEXTS = st.lists(st.integers(0, 3), max_size=60)


@given(TEXTS, st.integers(1, 9))
def test_draft_is_what_came_after_the_same_tokens(text: list[int], most: int):
    draft = Match(text).draft(most)
    places = [i for i in range(2, len(text)) if text[i - 2 : i] == text[-2:]]
    assert len(draft.tokens) == (most if places else 0)
    continuations = []
    for place in places:
        followed = list(text)
        for i in range(most):
            followed.append(followed[place + i])
        continuations.append(tuple(followed[len(text) :]))
    assert not places or draft.tokens in continuations


@given(TEXTS, st.lists(st.integers(1, 7), max_size=20))
def test_match_is_the_same_however_the_tokens_come(text: list[int], cuts: list[int]):
    one = Match()
    one.extend(text)
    other = Match()
    start = 0
    for cut in [*cuts, len(text)]:
        other.extend(text[start : start + cut])
        start += cut
    other.extend(text[start:])
    assert (one.tokens, one.draft(5)) == (other.tokens, other.draft(5))


def test_three_tokens_decide_before_two():
    text = [1, 2, 3, 9, 8, 2, 3, 7, 6, 1, 2, 3]
    assert Match(text).draft(1).tokens == (9,)
    assert Match([0, *text[1:-3], 5, 2, 3]).draft(1).tokens == (7,)


def test_long_match_is_followed_though_a_later_one_differs():
    text = [1, 2, 3, 4, 5, 6, 0, 4, 5, 9, 1, 2, 3]
    match = Match(text)
    assert match.draft(3).tokens == (4, 5, 6)
    match.extend([4, 5])
    assert match.draft(1).tokens == (6,)


def test_chance_follows_what_was_right_and_needs_no_draft():
    right, wrong = Match([1, 2, 3] * 3), Match()
    right.extend([1, 2, 3] * 30)
    for i in range(60):
        wrong.extend([1, 2, 3 + i])
    assert right.draft(1).chance > 0.95
    assert wrong.draft(1) == NO_DRAFT
    wrong.extend([1, 2])
    assert wrong.draft(1).chance < 0.1


def test_each_sequence_has_its_own_n_grams():
    drafter = NGrams()
    one, other = (Sequence(Request(ids), 9, "length", False) for ids in ([1, 2, 3, 1, 2], [1, 2]))
    assert [draft.tokens for draft in drafter.draft([one, other], 2)] == [(3, 1), ()]
    one.answer += [3, 1]
    other.answer += [5, 1, 2]
    assert [draft.tokens for draft in drafter.draft([other, one], 1)] == [(5,), (2,)]


@pytest.mark.parametrize(
    ("tokens", "inputs", "count"),
    [
        ([5], [1], 1),
        ([5, 6, 7], [1, 5, 6], 3),
        ([5, 6, 7], [1, 5, 9], 2),
        ([5, 6, 7], [1, 4, 6], 1),
        ([5, 6, 7], [1, 5, -1], 2),
    ],
)
def test_text_is_what_was_sampled_up_to_the_first_difference(
    tokens: list[int], inputs: list[int], count: int
):
    assert accepted(tokens, inputs) == count


def test_inputs_are_the_last_token_the_draft_and_padding():
    begun, new = (Sequence(Request([4, 5]), 9, "length", False) for _ in range(2))
    begun.answer += [6]
    found = inputs_of([begun, None, new], {begun: Draft((7, 8, 9), 0.5)}, 3)
    assert found.dtype == np.int32
    assert found.tolist() == [[6, 7, 8], [0, -1, -1], [5, -1, -1]]
    assert inputs_of([begun], {begun: Draft((7,), 0.5)}, 4).tolist() == [[6, 7, -1, -1]]


# ---- drafts and the scheduler together, with costs in place of a backend -------------------------


def speedup(prompt: list[int], answer: list[int], token_cost: float) -> float:
    """Return how many times as fast an answer comes, if each token of a step costs this much."""
    scheduler, match = Scheduler(), Match(prompt)
    done, took_s = 0, 0.0
    while done < len(answer):
        draft = match.draft(STEP_SIZES[-1] - 1)
        size = scheduler.step_wanted(1, len(answer) - done, [draft])
        step_s = 1 + token_cost * (size - 1)
        scheduler.step_took(1, size, step_s)
        took_s += step_s
        padding = [-1] * (size - 1 - len(draft.tokens))
        inputs = [0, *draft.tokens[: size - 1], *padding]
        new = answer[done : done + accepted(answer[done : done + size], inputs)]
        match.extend(new)
        done += len(new)
    return len(answer) / took_s


def diverging(rng: random.Random, count: int) -> list[int]:
    """Return a text that repeats two to six tokens again and again, and then goes on otherwise."""
    text = [rng.randrange(5000) for _ in range(20)]
    while len(text) < count:
        start = rng.randrange(len(text) - 6)
        text += [*text[start : start + rng.randint(2, 6)], rng.randrange(5000)]
    return text[:count]


@pytest.mark.parametrize(("token_cost", "least"), [(0.05, 0.97), (0.25, 0.97), (1.0, 0.95)])
@pytest.mark.parametrize("kinds", [5, 8, 20, 1000, "diverging"])
def test_text_that_cannot_be_guessed_costs_little(
    kinds: int | str, token_cost: float, least: float
):
    for seed in range(5):
        rng = random.Random(seed)
        text = diverging(rng, 400) if kinds == "diverging" else []
        text = text or [rng.randrange(int(kinds)) for _ in range(400)]
        assert speedup(text[:100], text[100:], token_cost) > least


@pytest.mark.parametrize(("token_cost", "least"), [(0.05, 3.0), (0.25, 2.3), (1.0, 0.97)])
def test_text_that_repeats_the_prompt_comes_faster(token_cost: float, least: float):
    rng = random.Random(1)
    prompt = [rng.randrange(5000) for _ in range(250)]
    answer = [token if rng.random() > 0.01 else 5001 for token in prompt]
    assert speedup(prompt, answer, token_cost) > least


def test_prediction_is_guessed_from_the_beginning_and_after_a_change():
    prompt, prediction = (50, 51, 52), (1, 2, 3, 4, 5, 6, 7, 8)
    drafter = NGrams()
    sequence = Sequence(Request(prompt, prediction=prediction), 99, "length", False)

    def draft(most: int) -> tuple[int, ...]:
        return drafter.draft([sequence], most)[0].tokens

    assert draft(4) == (1, 2, 3, 4)
    sequence.answer += [1, 2]
    assert draft(4) == (3, 4, 5, 6)
    sequence.answer += [90, 91]  # instead of 3
    assert draft(4) == ()
    sequence.answer += [4, 5]
    assert draft(3) == (6, 7, 8)


def test_prediction_counts_more_than_the_prompt_and_the_prompt_counts():
    match = Match((1, 2, 3, 4, 9, 8, 7), (1, 2, 3, 5))
    match.extend([60, 1, 2, 3])
    assert match.draft(1).tokens == (5,)
    match.extend([60, 9, 8])
    assert match.draft(1).tokens == (7,)


# ---- forced tokens -------------------------------------------------------------------------------


class Forces(LogitsProcessor):
    """Forces the same tokens for ever."""

    @classmethod
    def apply(cls, ops: Any, logits: Any, state: Any) -> Any:
        return logits

    def forced(self) -> list[int]:
        return [5, 6, 7]


class Asked(NGrams):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[int, int]] = []

    def checked(self, sequence: Sequence, drafted: int, accepted: int) -> None:
        self.told.append((drafted, accepted))


def test_forced_tokens_come_first_and_their_chance_is_learnt():
    other = Asked()
    drafter = Forced(other)
    text = [1, 2, 3, 1, 2]
    free = Sequence(Request(text), 9, "length", False)
    forced = Sequence(Request(text, processors=[Forces()]), 9, "length", False)
    first, second = drafter.draft([forced, free], 2)
    assert first == Draft((5, 6), 1.0)
    assert second.tokens == (3, 1)
    drafter.checked(forced, 2, 2)
    assert drafter.draft([forced], 7) == [Draft((5, 6, 7), 1.0)]
    drafter.checked(forced, 2, 0)
    after_a_miss = drafter.draft([forced], 7)[0].chance
    assert 0 < after_a_miss < 1
    drafter.checked(forced, 3, 3)
    assert after_a_miss < drafter.draft([forced], 7)[0].chance < 1
    assert other.told == []
    drafter.checked(free, 2, 1)
    assert other.told == [(2, 1)]
