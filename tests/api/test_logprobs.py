"""Tests of log probabilities in the Python API; tests/engine compares their figures."""

from __future__ import annotations

import pytest

import phicore
from phicore import ArgumentError, Model, TokenLogprobs


def test_each_piece_has_those_of_its_token(on_backend: Model) -> None:
    options = {"max_tokens": 8, "seed": 1, "ignore_eos": True}
    pieces = list(on_backend.generate("Hello", logprobs=3, **options))
    assert [piece.logprobs[0].token for piece in pieces] == [piece.token_id for piece in pieces]
    for piece in pieces:
        (found,) = piece.logprobs
        assert isinstance(found, TokenLogprobs)
        assert len(found.top) == 3
    plain = list(on_backend.generate("Hello", **options))
    assert [piece.logprobs for piece in plain] == [()] * 8
    assert [(p.token_id, p.text) for p in plain] == [(p.token_id, p.text) for p in pieces]


def test_answers_have_those_of_their_tokens(model: Model) -> None:
    requests = [
        model.request("Hello", seed=1, max_tokens=5, stop="e", logprobs=count)
        for count in (None, 2, None, 0)
    ]
    answers = list(model.generate_many(requests, ordered=True))
    assert len({answer.text for answer in answers}) == 1
    assert [len(answer.logprobs) for answer in answers] == [
        0 if request.logprobs is None else len(answer.token_ids)
        for request, answer in zip(requests, answers, strict=True)
    ]
    for answer in answers[1::2]:
        assert tuple(found.token for found in answer.logprobs) == answer.token_ids


def test_text_is_scored(on_backend: Model) -> None:
    ids = on_backend.encode("Hello world", raw=True)
    scores = on_backend.score(ids, 4)
    assert scores[0] is None
    assert [found.token for found in scores[1:] if found] == ids[1:]
    likeliest = on_backend.logits(ids).argmax(axis=-1)
    assert [found.top[0][0] for found in scores[1:] if found] == likeliest[:-1].tolist()
    without = on_backend.score(ids)
    assert [found and (found.logprob, found.top) for found in without] == [
        found and (found.logprob, ()) for found in scores
    ]


def test_number_is_checked(model: Model) -> None:
    for call in (model.generate, model.request):
        with pytest.raises(ArgumentError, match=r"^logprobs: expected 0 to 20, got 21$"):
            call("Hello", logprobs=21)
    with pytest.raises(ArgumentError, match=r"^logprobs: expected 0 to 20, got None$"):
        model.score([1, 2], None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^prompt: expected at least one token"):
        model.score([])


def test_name_is_public() -> None:
    assert phicore.TokenLogprobs is TokenLogprobs
