"""What is wrong with a request is told as OpenAI's API tells it, and harms nobody else."""

from __future__ import annotations

import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from server.conftest import ENDLESS, HI, Served, ready

import phicore
from phicore import Model
from phicore.network.processors import LogitsProcessor
from phicore.server import Settings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

WRONG: list[tuple[str, Any, str | None]] = [
    (CHAT, {"messages": HI, "temperature": "hot"}, "temperature"),
    (CHAT, {"messages": HI, "temperature": -1}, "temperature"),
    (
        CHAT,
        '{"messages": [{"role": "user", "content": "Hi"}], "temperature": 1e999}',
        "temperature",
    ),
    (CHAT, {"messages": HI, "temperature": True}, "temperature"),
    (CHAT, {"messages": HI, "top_p": 1.1}, "top_p"),
    (CHAT, {"messages": HI, "top_k": 1.5}, "top_k"),
    (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": HI, "max_completion_tokens": -2}, "max_completion_tokens"),
    (CHAT, {"messages": HI, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    (CHAT, {"messages": HI, "n": 0}, "n"),
    (CHAT, {"messages": HI, "n": 100000}, "n"),
    (CHAT, {"messages": HI, "seed": 2**64}, "seed"),
    (CHAT, {"messages": HI, "seed": "1"}, "seed"),
    (CHAT, {"messages": HI, "stop": [""]}, "stop"),
    (CHAT, {"messages": HI, "stop": [1]}, "stop"),
    (CHAT, {"messages": HI, "stop": ["x"] * 100}, "stop"),
    (CHAT, {"messages": HI, "stop": "x" * 1001}, "stop"),
    (CHAT, {"messages": HI * 5000}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}] * 5000}]}, "messages"),
    (CHAT, {"messages": HI, "stream": "yes"}, "stream"),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"messages": HI, "logit_bias": {"a": 1}}, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"1": 101}}, "logit_bias"),
    (CHAT, {"messages": HI, "logit_bias": {"99999": 1}, "max_tokens": 1}, "logit_bias"),
    (CHAT, {"messages": HI, "frequency_penalty": 3}, "frequency_penalty"),
    (CHAT, {"messages": HI, "repetition_penalty": 0}, "repetition_penalty"),
    (CHAT, {"messages": HI, "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    (CHAT, {"messages": HI, "model": 1}, "model"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Hi"}, "messages"),
    (CHAT, {"messages": ["Hi"]}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"role": 1, "content": "Hi"}]}, "messages"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [["a"]]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    (CHAT, {"messages": HI, "chat_template_kwargs": [1]}, "chat_template_kwargs"),
    (CHAT, "{", None),
    (CHAT, "[1]", None),
    (CHAT, "", None),
    (CHAT, '{"messages": NaN}', None),
    (CHAT, b"\xff\xfe", None),
    (CHAT, "[" * 100000, None),
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": [1, "a"]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [10**9]}, "prompt"),
    (TEXT, {"prompt": ["a"] * 200}, "prompt"),
    (TEXT, {"prompt": "a", "suffix": "b"}, "suffix"),
    (TEXT, {"prompt": "a", "best_of": 2}, "best_of"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"content": 1}, "content"),
    ("/tokenize", {"content": "\ud800"}, "content"),
    ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/apply-template", {"messages": 1}, "messages"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_wrong_field_is_a_400_that_names_it(
    served: Served, path: str, body: Any, param: str | None
):
    status, answer, headers = served.post(path, body)
    assert status == 400, answer
    error = answer["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param is None or param in error["message"]
    assert headers["x-request-id"]
    assert served.is_free


HALF = '"\\ud800"'
TOOL = f'{{"type": "function", "function": {{"name": {HALF}}}}}'
HALVES = [
    (CHAT, f'"tools": [{TOOL}], "tool_choice": "required"', "tools"),
    (CHAT, f'"guided_regex": {HALF}', "guided_regex"),
    (CHAT, f'"guided_choice": [{HALF}]', "guided_choice"),
    (CHAT, f'"guided_json": {{"enum": [{HALF}]}}', "guided_json"),
    (CHAT, '"guided_grammar": "start: \\"\\ud800\\""', "guided_grammar"),
    (CHAT, f'"model": {HALF}', "model"),
    (TEXT, f'"prompt": "a", "stop": {HALF}', "stop"),
    ("/apply-template", f'"user": {{{HALF}: 1}}', "user"),
    ("/tokenize", f'"content": "a", {HALF}: 1', "\\ud800"),
]


@pytest.mark.parametrize(("path", "field", "param"), HALVES)
def test_half_of_a_character_is_refused_wherever_it_is(
    served: Served, path: str, field: str, param: str
):
    """Six fields ended in tracebacks and status 500: nothing can write such a text as UTF-8."""
    status, answer, _ = served.post(path, f'{{"messages": {json.dumps(HI)}, {field}}}')
    assert status == 400, answer
    assert answer["error"]["param"] == param
    assert "half of a character" in answer["error"]["message"]


def test_message_that_quotes_a_request_is_a_short_line_without_control_characters(served: Served):
    name = "a\nb\x1b[31m"
    status, answer, _ = served.post(CHAT, {"messages": HI, "model": name})
    assert status == 404
    assert "a\\nb\\x1b[31m" in answer["error"]["message"]
    tools = [{"type": "function", "function": {"name": f"{name}{i}" + "x" * 50}} for i in range(60)]
    choice = {"type": "function", "function": {"name": "y"}}
    body = {"messages": HI, "tools": tools, "tool_choice": choice}
    status, answer, _ = served.post(CHAT, body)
    assert status == 400
    assert answer["error"]["message"].isprintable()
    assert len(answer["error"]["message"]) < 3000


NOT_HONOURED: list[dict[str, Any]] = [
    {"functions": [{"name": "f"}]},
    {"modalities": ["text", "audio"]},
    {"min_tokens": 5},
    {"continue_final_message": True},
    {"mirostat": 2},
]


@pytest.mark.parametrize("field", NOT_HONOURED, ids=lambda field: next(iter(field)))
def test_known_field_that_cannot_be_honoured_is_a_400(served: Served, field: dict[str, Any]):
    status, answer, _ = served.post(CHAT, {"messages": HI, "max_tokens": 1, **field})
    assert status == 400
    assert answer["error"]["param"] == next(iter(field))
    assert answer["error"]["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    "field",
    [
        {"tools": []},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"tools": None},
        {"best_of": 1},
        {"mirostat": 0},
        {"typical_p": 1.0},
    ],
    ids=str,
)
def test_field_that_asks_for_nothing_is_taken(served: Served, field: dict[str, Any]):
    assert served.post(CHAT, {"messages": HI, "max_tokens": 1, **field})[0] == 200


def test_other_model_is_a_404(served: Served):
    with pytest.raises(openai.NotFoundError) as error:
        served.client.chat.completions.create(model="gpt-4o", messages=HI)
    assert error.value.code == "model_not_found"
    assert error.value.param == "model"


def test_other_model_is_taken_with_the_flag_and_its_name_is_told(model: Model):
    with ready(model, settings=Settings(any_model=True)) as served:
        answer = served.client.chat.completions.create(
            model="gpt-3.5-turbo", messages=HI, max_tokens=1
        )
        assert answer.model == "gpt-3.5-turbo"


def test_path_and_method_that_do_not_exist(served: Served):
    status, answer, _ = served.post("/v1/nothing", {})
    assert status == 404
    assert answer["error"]["type"] == "not_found_error"
    status, answer, headers = served.get(CHAT)
    assert status == 405
    assert "POST" in headers["allow"]
    assert answer["error"]["message"]


def test_prompt_that_is_too_long_is_told_in_openais_words(served: Served, model: Model):
    long = [{"role": "user", "content": "word " * 1000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            served.client.chat.completions.create(model="tiny", messages=long, stream=stream)
        assert error.value.code == "context_length_exceeded"
        assert f"This model's maximum context length is {model.context} tokens." in str(error.value)
    status, answer, _ = served.post(TEXT, {"prompt": [5] * model.context})
    assert status == 400
    assert answer["error"]["code"] == "context_length_exceeded"
    assert f"resulted in {model.context} tokens" in answer["error"]["message"]
    body = {"prompt": [5] * (model.context - 1), "max_tokens": 1}
    assert served.post(TEXT, body)[0] == 200


def test_limits_are_kept(model: Model):
    settings = Settings(max_answer=3, max_prompt=20, max_body=500)
    with ready(model, settings=settings) as served:
        body = {"prompt": [5], "max_tokens": 100, "ignore_eos": True}
        assert served.post(TEXT, body)[1]["usage"]["completion_tokens"] == 3
        chat = {"messages": HI, "ignore_eos": True}
        assert served.post(CHAT, chat)[1]["usage"]["completion_tokens"] == 3
        status, answer, _ = served.post(TEXT, {"prompt": [5] * 21})
        assert (status, answer["error"]["code"]) == (400, "too_long")
        status, answer, _ = served.post(TEXT, {"prompt": "a" * 500})
        assert (status, answer["error"]["code"]) == (413, "too_large")
        connection = http.client.HTTPConnection(*served.address, timeout=60)
        parts = (b"a" * 100 for _ in range(10))
        connection.request("POST", TEXT, parts, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()


def test_long_text_is_split_into_tokens_while_others_are_answered(served: Served):
    """The library can hold Python's lock while it splits a text, and nothing else runs then."""
    long = {"prompt": "The sea is wide and deep. " * 120_000}
    with ThreadPoolExecutor(1) as pool:
        refused = pool.submit(served.post, TEXT, long)
        others = 0
        while not refused.done():
            assert served.post(TEXT, {"prompt": "The", "max_tokens": 1})[0] == 200
            others += 1
    status, answer, _ = refused.result()
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert others >= 5


def test_body_may_come_in_chunks(served: Served):
    connection = http.client.HTTPConnection(*served.address, timeout=60)
    parts = iter([b'{"prompt": "The s', b'ea", "max_to', b'kens": 1}'])
    connection.request("POST", TEXT, parts, encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()


def test_time_limit_ends_an_answer(endless_path: Any):
    with (
        phicore.load(endless_path, "numpy") as loaded,
        ready(loaded, settings=Settings(time_limit=0.3)) as served,
    ):
        status, answer, _ = served.post(CHAT, {"messages": HI, **ENDLESS})
        assert status == 504
        assert answer["error"]["type"] == "timeout_error"
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(
                served.client.chat.completions.create(
                    model="tiny", messages=HI, stream=True, max_tokens=15000, temperature=0
                )
            )
        served.wait_until(lambda: served.is_free, "the end")


class Faulty(LogitsProcessor):
    """A processor that fails at the third token."""

    def __init__(self) -> None:
        self._count = 0

    @classmethod
    def apply(cls, ops: Any, logits: Any, state: Any) -> Any:
        return logits

    def update(self, token: int) -> Any:
        self._count += 1
        if self._count == 3:
            raise ValueError("a secret of the server")
        return {}


@pytest.mark.parametrize("stream", [False, True])
def test_fault_in_one_answer_is_told_to_its_client_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool
):
    import phicore.server.parameters as parameters

    real = parameters._processors
    monkeypatch.setattr(
        parameters,
        "_processors",
        lambda fields, size: [Faulty()] if fields.get("user") else real(fields, size),
    )
    body: Any = {"model": "tiny", "messages": HI, "max_tokens": 20, "stream": stream}
    body |= {"user": "faulty", "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.APIError) as error:
        list(served.client.chat.completions.create(**body))
    assert "secret" not in str(error.value)
    assert error.value.code == "server_error"
    assert served.post(CHAT, {"messages": HI, "max_tokens": 2})[0] == 200
    served.wait_until(lambda: served.is_free, "the end")
