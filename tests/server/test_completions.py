"""/v1/completions, and the routes about tokens."""

from __future__ import annotations

import json
from typing import Any

from server.conftest import HI, Served

from phicore import Model


def test_text_is_continued_as_by_generate(served: Served, model: Model):
    answer = served.client.completions.create(
        model="tiny", prompt="Once upon", seed=4, temperature=1
    )
    expected = model.generate("Once upon", raw=True, seed=4, temperature=1, max_tokens=16)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].text == expected.text()
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)


def test_prompts_may_be_texts_or_tokens(served: Served, model: Model):
    texts = ["Once upon", "The sea"]
    ids = [model.encode(text, raw=True) for text in texts]
    found = []
    for prompt in (texts, ids):
        answer = served.client.completions.create(model="tiny", prompt=prompt, seed=4, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        found.append([choice.text for choice in answer.choices])
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert found[0] == found[1]
    single = served.client.completions.create(model="tiny", prompt=ids[1], seed=4)
    assert single.choices[0].text == found[0][2]


def test_echo_begins_with_the_prompt(served: Served):
    body: dict[str, Any] = {"model": "tiny", "prompt": ["Once", "upon"], "seed": 4}
    plain = served.client.completions.create(**body)
    echoed = served.client.completions.create(**body, echo=True)
    texts = [choice.text for choice in plain.choices]
    assert [choice.text for choice in echoed.choices] == [f"Once{texts[0]}", f"upon{texts[1]}"]
    streamed = ["", ""]
    for chunk in served.client.completions.create(**body, echo=True, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in echoed.choices]


def test_stream_ends_with_the_reason_and_done(served: Served):
    *found, last = served.events({"prompt": "The", "max_tokens": 5}, "/v1/completions")
    assert last == "[DONE]"
    choices = [json.loads(data)["choices"][0] for data in found]
    assert choices[-1]["text"] == ""
    assert choices[-1]["finish_reason"] in ("stop", "length")
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert {json.loads(data)["object"] for data in found} == {"text_completion"}


def test_tokenize_and_detokenize_are_inverse(served: Served, model: Model):
    text = "The sea é <|user|>"
    status, found, _ = served.post("/tokenize", {"content": text})
    assert status == 200
    assert found["tokens"] == model.tokenizer.encode(text, add_bos=False)
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == model.context
    status, again, _ = served.post("/detokenize", {"tokens": found["tokens"]})
    assert status == 200
    assert again["content"] == model.tokenizer.decode(found["tokens"], skip_special=False)
    plain = served.post("/tokenize", {"content": text, "parse_special": False})[1]
    assert not any(model.tokenizer.is_control(id) for id in plain["tokens"])


def test_tokenize_shows_the_bytes_of_parts_of_characters(served: Served):
    found = served.post("/tokenize", {"content": "a🦖", "with_pieces": True})[1]["tokens"]
    data = [p.encode() if isinstance(p, str) else bytes(p) for p in (t["piece"] for t in found)]
    assert b"".join(data).strip() == "a🦖".encode()


def test_conversation_becomes_the_prompt_that_the_model_reads(served: Served, model: Model):
    prompt = served.post("/apply-template", {"messages": HI})[1]["prompt"]
    assert "Hi" in prompt
    assert model.encode(prompt, raw=True) == model.encode(HI)
    assert served.post("/tokenize", {"messages": HI})[1]["tokens"] == model.encode(HI)
