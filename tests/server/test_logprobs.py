"""Log probabilities over HTTP are the engine's, and their tokens join to the text."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from server.conftest import HI, Served

from phicore import Model

BODY: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 25, "seed": 3}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_chat_tells_the_engines_log_probabilities(served: Served, model: Model, temperature: float):
    answer = served.client.chat.completions.create(
        **BODY, temperature=temperature, logprobs=True, top_logprobs=3
    )
    pieces = list(model.generate("Hi", max_tokens=25, seed=3, temperature=temperature, logprobs=3))
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    expected = [piece.logprobs[0] for piece in pieces if piece.token_id not in model_ends(model)]
    assert [each.logprob for each in told.content] == [each.logprob for each in expected]
    for each, found in zip(told.content, expected, strict=True):
        assert [top.logprob for top in each.top_logprobs] == [lp for _, lp in found.top]
    data = b"".join(bytes(each.bytes or []) for each in told.content)
    text = answer.choices[0].message.content
    assert data.decode(errors="replace") == text


def model_ends(model: Model) -> frozenset[int]:
    return frozenset(model.tokenizer.end_token_ids)


def test_text_does_not_depend_on_log_probabilities(served: Served):
    plain = served.client.chat.completions.create(**BODY).choices[0].message.content
    told = served.client.chat.completions.create(**BODY, logprobs=True).choices[0]
    assert told.message.content == plain
    assert told.logprobs is not None
    assert told.logprobs.content is not None
    assert all(each.top_logprobs == [] for each in told.logprobs.content)


@pytest.mark.parametrize("stop", [None, ["e", "a"]])
def test_stream_tells_the_same_as_the_whole_answer(served: Served, stop: list[str] | None):
    body = {**BODY, "logprobs": True, "top_logprobs": 2, "stop": stop}
    whole = served.client.chat.completions.create(**body).choices[0].logprobs
    assert whole is not None
    told = []
    for chunk in served.client.chat.completions.create(**body, stream=True):
        logprobs = chunk.choices[0].logprobs
        told += (logprobs.content or []) if logprobs else []
    assert told == whole.content


def test_stop_string_is_in_no_token(served: Served):
    text = served.client.chat.completions.create(**BODY).choices[0].message.content or ""
    stop = text[4:6]
    choice = served.client.chat.completions.create(**BODY, logprobs=True, stop=stop).choices[0]
    assert choice.logprobs is not None
    tokens = "".join(each.token for each in choice.logprobs.content or [])
    assert tokens.startswith(choice.message.content or "")
    assert len(tokens) <= len(choice.message.content or "") + len(stop)


def joined(tokens: list[str]) -> str:
    """Return the text of tokens, some of which are told as the bytes of a part of a character."""
    data = [
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
        if token.startswith("bytes:")
        else token.encode()
        for token in tokens
    ]
    return b"".join(data).decode(errors="replace")


def test_completions_tell_lists_with_offsets(served: Served):
    body: dict[str, Any] = {"model": "tiny", "prompt": "The sea", "seed": 2, "logprobs": 2}
    choice = served.client.completions.create(**body).choices[0]
    found = choice.logprobs
    assert found is not None
    assert joined(found.tokens or []) == choice.text
    assert len(found.tokens or []) == len(found.token_logprobs or [])
    for token, logprob, top in zip(
        found.tokens or [], found.token_logprobs or [], found.top_logprobs or [], strict=True
    ):
        assert top[token] >= logprob
        assert len(top) <= 3
    offsets = found.text_offset or []
    for offset, token in zip(offsets, found.tokens or [], strict=True):
        # A token may come after the rest of a character that was never completed.
        here = choice.text[offset : offset + len(token) + 3]
        assert token in here or token.startswith("bytes:")
    parts = []
    for data in served.events(body, "/v1/completions")[:-1]:
        part = json.loads(data)["choices"][0]["logprobs"]
        parts += part["tokens"] if part else []
    assert parts == found.tokens


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_echo_scores_the_prompt_as_evaluation_harnesses_want_it(
    served: Served, model: Model, max_tokens: int
):
    ids = model.encode("The sea is wide", raw=True)
    for prompt in (ids, "The sea is wide"):
        choice = served.client.completions.create(
            model="tiny", prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens, seed=1
        ).choices[0]
        found = choice.logprobs
        assert found is not None
        logprobs = found.token_logprobs or []
        assert len(logprobs) >= len(ids)
        scores = model.score(ids, 1)
        assert logprobs[0] is None
        assert logprobs[1 : len(ids)] == [score.logprob for score in scores[1:] if score]
        assert choice.text.removeprefix("<s> ").startswith("The sea is wide")
        tokens, offsets = found.tokens or [], found.text_offset or []
        place = tokens.index(" w")
        assert choice.text[offsets[place] :].startswith(" wide")
        assert len(found.text_offset or []) == len(logprobs)


def test_number_of_alternatives_is_checked(served: Served):
    with pytest.raises(openai.BadRequestError) as error:
        served.client.chat.completions.create(**BODY, top_logprobs=2)
    assert error.value.param == "top_logprobs"
    with pytest.raises(openai.BadRequestError):
        served.client.completions.create(model="tiny", prompt="a", logprobs=21)
    answer = served.client.chat.completions.create(
        **{**BODY, "max_tokens": 1}, logprobs=True, top_logprobs=20
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert [len(each.top_logprobs) for each in logprobs.content or []] == [20]
