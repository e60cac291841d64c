"""Tests of tools in the Python API: messages with calls, prompts, wrong arguments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from api.tiny_models import with_value, write_tiny

import phicore
from phicore import Model
from phicore.errors import ArgumentError, TokenizerError

HI = [{"role": "user", "content": "Hi"}]
FLIP: dict[str, Any] = {
    "name": "flip",
    "parameters": {"properties": {"heads": {"type": "boolean"}}, "required": ["heads"]},
}
FORCED: dict[str, Any] = {
    "tools": [FLIP],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 200,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = write_tiny(tmp_path_factory.mktemp("m") / "tiny.gguf", max_position_embeddings=2000)
    return phicore.load(path, "numpy")


def test_message_has_the_calls_and_a_conversation_goes_on_with_it(model: Model):
    message = model.generate(HI, seed=1, **FORCED).message()
    [call] = message["tool_calls"]
    assert message["content"] is None
    assert json.loads(call["function"]["arguments"])["heads"] in (True, False)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "won"}
    prompt = model.render([*HI, message, result], tools=[FLIP])
    assert call["function"]["arguments"] in prompt
    assert "won" in prompt
    text = model.generate([*HI, message, result], tools=[FLIP], seed=1, max_tokens=5)
    assert text.message() == {"role": "assistant", "content": model.generate(text.request).text()}


def test_answers_of_many_requests_have_messages(model: Model):
    requests = [model.request(HI, seed=seed, **FORCED) for seed in range(3)]
    requests.append(model.request(HI, seed=1, max_tokens=4))
    *called, plain = model.generate_many(requests, ordered=True)
    for answer in called:
        alone = model.generate(requests[answer.index]).message()["tool_calls"][0]["function"]
        assert answer.message()["tool_calls"][0]["function"] == alone
    assert plain.message() == {"role": "assistant", "content": plain.text}


@pytest.mark.parametrize(
    "shown", ["c.function.arguments", "'' + c.function.arguments", "c.function.arguments | tojson"]
)
def test_arguments_are_objects_or_texts_as_the_template_wants(tmp_path: Path, shown: str):
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}<{{ "
        + shown
        + " }}>{% endfor %}{% endfor %}{% if tools %}<tool_call>{% endif %}"
    )
    path = write_tiny(tmp_path / "m.gguf", with_value("tokenizer.chat_template", template))
    with phicore.load(path, "numpy") as model:
        for arguments in ({"a": "<|end|>", "b": [1, None]}, '{"a": "<|end|>", "b": [1, null]}'):
            call = {"function": {"name": "f", "arguments": arguments}}
            prompt = model.render([*HI, {"role": "assistant", "content": "", "tool_calls": [call]}])
            assert '<{"a": "<|end|>", "b": [1, null]}>' in prompt


def test_tools_that_nobody_may_call_are_not_in_the_prompt(model: Model):
    request = model.request(HI, tools=[FLIP], tool_choice="none")
    assert request.prompt_ids == model.request(HI).prompt_ids
    assert request.tools is None
    assert len(model.request(HI, tools=[FLIP]).prompt_ids) > len(request.prompt_ids)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({**FORCED, "json_schema": True}, "json_schema"),
        ({**FORCED, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({**FORCED, "tool_choice": "flip"}, "tool_choice"),
        ({**FORCED, "raw": True}, "tools"),
        ({**FORCED, "tools": "flip"}, "tools"),
        ({**FORCED, "tools": None}, "tool_choice"),
        ({**FORCED, "ignore_eos": True}, "tools"),
    ],
    ids=str,
)
def test_wrong_arguments_are_errors_that_name_them(
    model: Model, options: dict[str, Any], parameter: str
):
    with pytest.raises(ArgumentError) as error:
        model.request("Hi", **options)
    assert error.value.parameter == parameter


def test_without_the_library_calls_are_parsed_but_not_forced(
    model: Model, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("phicore.prompting.requests.find_spec", lambda name: None)
    use = model.request(HI, tools=[FLIP]).tools
    assert use is not None
    assert not use.is_constrained
    for options in (FORCED, {"tools": [{**FLIP, "strict": True}]}):
        with pytest.raises(ArgumentError, match=r"^tools: .*phicore\[grammar\]"):
            model.request(HI, **options)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x", "tool_call_id": {}},
        {"role": "tool", "content": "x", "tool_call_id": "unknown"},
        {"role": "user", "content": "x", "tool_calls": [{"name": "flip"}]},
        {"role": "assistant", "content": "x", "tool_calls": []},
    ],
    ids=str,
)
def test_odd_messages_make_a_prompt(model: Model, message: Any):
    assert model.encode([*HI, message], tools=[FLIP])


@pytest.mark.parametrize("message", ["text", {"role": "assistant", "tool_calls": ["x"]}], ids=str)
def test_message_that_is_none_is_an_error_that_names_it(model: Model, message: Any):
    with pytest.raises(TokenizerError, match=r"messages\[1\]"):
        model.encode([*HI, message], tools=[FLIP])
