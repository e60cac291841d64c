"""Drafts of n-grams, and which of the sampled tokens are the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.engine import Request, Sequence
from phicore.engine.drafts import NO_DRAFT, Draft, Match, NGrams, accepted, inputs_of

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
