"""/v1/chat/completions, as OpenAI's client and llama.cpp's tests see it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from api.tiny_models import write_tiny
from server.conftest import HI, Served

import phicore
from phicore import Model


def chunks(served: Served, **body: Any) -> list[dict[str, Any]]:
    """Return the objects of a stream; check that it ends as it must."""
    *found, last = served.events({"messages": HI, "max_tokens": 8, "seed": 1, **body})
    assert last == "[DONE]"
    return [json.loads(data) for data in found]


def test_answer_has_openais_shape(served: Served, model: Model):
    answer = served.client.chat.completions.create(
        model="tiny", messages=HI, max_completion_tokens=8, seed=1, temperature=0.9
    )
    expected = model.generate("Hi", max_tokens=8, seed=1, temperature=0.9)
    pieces = list(expected)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "".join(piece.text for piece in pieces)
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)
    assert answer.usage.completion_tokens == len(pieces)
    assert answer.usage.total_tokens == len(expected.prompt_ids) + len(pieces)
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")


def test_stream_has_role_once_one_id_and_an_empty_last_delta(served: Served):
    found = chunks(served)
    assert len({c["id"] for c in found}) == 1
    assert len({c["created"] for c in found}) == 1
    assert {c["object"] for c in found} == {"chat.completion.chunk"}
    assert {c["model"] for c in found} == {"tiny"}
    deltas = [c["choices"][0]["delta"] for c in found]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert not any("role" in delta for delta in deltas[1:])
    assert deltas[-1] == {}
    reasons = [c["choices"][0]["finish_reason"] for c in found]
    assert reasons[-1] in ("stop", "length")
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert not any("usage" in c for c in found)


def test_stream_has_the_text_of_the_whole_answer(served: Served):
    body = {"model": "tiny", "messages": HI, "max_tokens": 30, "seed": 5}
    whole = served.client.chat.completions.create(**body).choices[0]
    stream = list(served.client.chat.completions.create(**body, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.message.content
    assert stream[-1].choices[0].finish_reason == whole.finish_reason


def test_usage_in_a_stream_comes_last_without_choices_if_it_is_asked_for(served: Served):
    *others, last = chunks(served, stream_options={"include_usage": True})
    assert last["choices"] == []
    usage = last["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert last["object"] == "chat.completion.chunk"
    assert all(c["usage"] is None and c["choices"] for c in others)


def test_several_choices_have_their_own_texts_and_derived_seeds(served: Served, model: Model):
    answer = served.client.chat.completions.create(
        model="tiny", messages=HI, n=3, seed=7, max_tokens=20, temperature=1.5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    seeds = [(7 + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(3)]
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.5}
    assert texts == [model.generate("Hi", seed=seed, **options).text() for seed in seeds]
    assert [choice.seed for choice in answer.choices] == seeds  # type: ignore[attr-defined]
    assert len(set(texts)) == 3


def test_choices_of_a_stream_are_told_apart_by_their_index(served: Served):
    body = {"n": 3, "max_tokens": 12, "temperature": 1.5}
    found = chunks(served, **body)
    texts = ["", "", ""]
    for chunk in found:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content") or ""
    answer = served.client.chat.completions.create(model="tiny", messages=HI, seed=1, **body)
    assert texts == [choice.message.content for choice in answer.choices]


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**64 - 1, 0])
def test_any_seed_of_64_bits_is_taken_modulo(served: Served, model: Model, seed: int):
    answer = served.client.chat.completions.create(
        model="tiny", messages=HI, seed=seed, max_tokens=6, temperature=1
    )
    expected = model.generate("Hi", seed=seed % 2**64, max_tokens=6, temperature=1).text()
    assert answer.choices[0].message.content == expected


def test_random_seed_is_told_and_gives_the_text_again(served: Served):
    body = {"model": "tiny", "messages": HI, "max_tokens": 20, "temperature": 2}
    first = served.client.chat.completions.create(**body).choices[0]
    again = served.client.chat.completions.create(**body, seed=first.seed).choices[0]
    assert again.message.content == first.message.content


def test_content_may_be_text_parts_or_nothing(served: Served):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    texts = []
    for messages in (HI, [{"role": "user", "content": parts}]):
        status, answer, _ = served.post(
            "/v1/chat/completions", {"messages": messages, "max_tokens": 6, "seed": 3}
        )
        assert status == 200
        texts.append(answer["choices"][0]["message"]["content"])
    assert texts[0] == texts[1]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    conversation = [
        {"role": "developer", "content": "Be brief."},
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        *HI,
    ]
    body = {"messages": conversation, "max_tokens": 2}
    status, answer, _ = served.post("/v1/chat/completions", body)
    assert status == 200, answer


def test_stop_strings_end_the_text_before_them(served: Served):
    body = {"model": "tiny", "messages": HI, "max_tokens": 30, "seed": 5}
    text = served.client.chat.completions.create(**body).choices[0].message.content
    assert text is not None
    stop = text[len(text) // 2 :][:3]
    for stops in (stop, ["never there", stop], None):
        choice = served.client.chat.completions.create(**body, stop=stops).choices[0]
        expected = text if stops is None else text[: text.index(stop)]
        assert choice.message.content == expected
        assert choice.finish_reason == "stop" if stops is not None else True


def test_penalties_and_bias_are_those_of_generate(served: Served, model: Model):
    from phicore.network.processors import AnswerPenalty, LogitBias

    answer = served.client.chat.completions.create(
        model="tiny",
        messages=HI,
        seed=9,
        max_tokens=20,
        logit_bias={"5": 4, "7": -100},
        frequency_penalty=0.5,
        presence_penalty=0.25,
        extra_body={"top_k": 30, "min_p": 0.01, "repetition_penalty": 1.2},
    )
    expected = model.generate(
        "Hi",
        seed=9,
        max_tokens=20,
        processors=[LogitBias({5: 4, 7: -100}), AnswerPenalty(frequency=0.5, presence=0.25)],
        top_k=30,
        min_p=0.01,
        repeat_penalty=1.2,
    ).text()
    assert answer.choices[0].message.content == expected


def test_full_context_is_told_as_length(served: Served):
    body = {"messages": HI, "temperature": 0, "ignore_eos": True}
    status, answer, _ = served.post("/v1/chat/completions", body)
    assert status == 200
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 320


def test_unknown_fields_are_ignored_and_the_path_may_lack_its_version(served: Served):
    body = {"messages": HI, "max_tokens": 1, "no_such_field": 1, "user": "me", "metadata": {}}
    for path in ("/v1/chat/completions", "/chat/completions"):
        assert served.post(path, body)[0] == 200


def test_models_are_listed_and_described(served: Served, model: Model):
    assert [each.id for each in served.client.models.list()] == ["tiny", "other"]
    found = served.client.models.retrieve("other")
    assert found.object == "model"
    assert found.max_model_len == model.context  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("absent")
    assert served.get("/models")[1] == served.get("/v1/models")[1]


def test_cached_tokens_and_times_are_in_usage(served: Served):
    long = [{"role": "user", "content": "Tell me about the sea and the wind. " * 3}]
    body = {"messages": long, "max_tokens": 4, "seed": 1}
    served.post("/v1/chat/completions", body)
    usage = served.post("/v1/chat/completions", body)[1]["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert cached == usage["prompt_tokens"] - 1
    assert usage["timings"]["cache_n"] == cached
    assert usage["timings"]["predicted_n"] == usage["completion_tokens"]


def test_fingerprint_changes_when_the_bits_may(tiny_path: Path, tmp_path: Path):
    other = write_tiny(tmp_path / "other.gguf", intermediate_size=128)
    made = [
        (tiny_path, "jax", {}),
        (tiny_path, "numpy", {}),
        (tiny_path, "jax", {"cache_type": "f32"}),
        (other, "jax", {}),
    ]
    found = []
    for path, backend, options in [*made, made[0]]:
        with phicore.load(path, backend, **options) as loaded:
            found.append(loaded.fingerprint)
    assert found[-1] == found[0]
    assert len(set(found)) == len(made)
