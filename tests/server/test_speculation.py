"""Guessed tokens in the web API: the fields that concern them, what is told, and the same texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.test_speculation import Always
from server.conftest import HI, Served, ready
from server.test_metrics import values

import phicore
from phicore import Model

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODY: dict[str, Any] = {"messages": HI, "max_tokens": 40, "seed": 3, "ignore_eos": True}
DETAILS = "completion_tokens_details"


@pytest.fixture(scope="module")
def guessing(tiny_path: Path) -> Iterator[Model]:
    """Load a model that checks all guesses of n-grams, and of itself."""
    with phicore.load(tiny_path, "numpy", draft_model=tiny_path) as loaded:
        loaded.engine.scheduler = Always()
        yield loaded


@pytest.fixture
def guessed(guessing: Model) -> Iterator[Served]:
    with ready(guessing) as found:
        yield found


@pytest.fixture(scope="module")
def plain(tiny_path: Path) -> Iterator[Served]:
    with phicore.load(tiny_path, "numpy") as loaded, ready(loaded) as found:
        yield found


def answered(served: Served, path: str = CHAT, **body: Any) -> tuple[str, dict[str, int]]:
    """Return the text of an answer, and what usage tells of guesses."""
    given = {**BODY, "prompt": "Hi"} if path == TEXT else BODY
    status, found, _ = served.post(path, {**given, **body})
    assert status == 200, found
    choice = found["choices"][0]
    text = choice["text"] if path == TEXT else choice["message"]["content"]
    return text, found["usage"][DETAILS]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_usage_tells_guesses_and_a_field_opts_out(guessed: Served, plain: Served, path: str):
    none = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    for temperature in (0, 0.7):
        text, details = answered(plain, path, temperature=temperature)
        assert details == none
        found, details = answered(guessed, path, temperature=temperature)
        assert found == text
        assert details["accepted_prediction_tokens"] > 0
        opted = answered(guessed, path, temperature=temperature, speculation=False)
        assert opted == (text, none)


def test_prediction_is_accepted_where_the_answer_repeats_it(tiny_path: Path, plain: Served):
    text, _ = answered(plain)
    none = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
    assert answered(plain, prediction={"type": "content", "content": text}) == (text, none)
    counts = []
    parts = [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]
    with phicore.load(tiny_path, "numpy", speculation=True) as model, ready(model) as served:
        model.engine.scheduler = Always()
        for content in ("", text, parts):
            given = {"type": "content", "content": content}
            found, details = answered(served, prediction=given)
            assert found == text
            counts.append(details["accepted_prediction_tokens"])
    assert counts[1] == counts[2] > counts[0]


def test_openai_client_sends_predictions_and_reads_what_was_accepted(guessed: Served):
    answer = guessed.client.chat.completions.create(
        model="tiny",
        messages=HI,  # type: ignore[arg-type]
        max_tokens=12,
        prediction={"type": "content", "content": "The sea"},
    )
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens is not None
    body = {**BODY, "stream_options": {"include_usage": True}}
    assert '"accepted_prediction_tokens"' in guessed.events(body)[-2]


@pytest.mark.parametrize(
    "prediction",
    [
        {"type": "text", "content": "a"},
        {"content": "a"},
        {"type": "content"},
        {"type": "content", "content": 7},
        {"type": "content", "content": [{"type": "image_url"}]},
        {"type": "content", "content": [{"type": "text"}]},
        {"type": "content", "content": "\ud800"},
        "a text",
        {},
    ],
)
def test_wrong_prediction_is_refused(guessed: Served, prediction: Any):
    status, found, _ = guessed.post(CHAT, {**BODY, "prediction": prediction})
    assert (status, found["error"]["param"]) == (400, "prediction")
    status, found, _ = guessed.post(CHAT, {**BODY, "speculation": "no"})
    assert (status, found["error"]["param"]) == (400, "speculation")


def test_metrics_count_guesses_with_vllms_names(guessed: Served):
    answers = [answered(guessed, seed=seed)[1] for seed in (1, 2)]
    guessed.wait_until(lambda: guessed.is_free, "the end")
    found = values(guessed)
    accepted = sum(each["accepted_prediction_tokens"] for each in answers)
    rejected = sum(each["rejected_prediction_tokens"] for each in answers)
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == accepted > 0
    assert found["vllm:spec_decode_num_draft_tokens_total"] == accepted + rejected
    assert 0 < found["vllm:spec_decode_num_drafts_total"] < accepted + rejected
