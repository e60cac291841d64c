"""Tests of answers that a schema, an expression or a grammar constrains, over HTTP."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from server.conftest import Served

HI = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [12, 13]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
}
AN_OBJECT = r'\{"a":1[23],"b":(true|false)\}'
JSON_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
}
NUMBER = "root ::= [0-9] [0-9]"
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"response_format": JSON_SCHEMA}, AN_OBJECT),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, AN_OBJECT),
    ({"json_schema": SCHEMA}, AN_OBJECT),
    ({"format": SCHEMA}, AN_OBJECT),
    ({"guided_json": json.dumps(SCHEMA)}, AN_OBJECT),
    ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
    ({"guided_choice": ["yes (a)", "no."]}, r"yes \(a\)|no\."),
    ({"guided_grammar": NUMBER}, "[0-9]{2}"),
    ({"grammar": NUMBER}, "[0-9]{2}"),
    ({"structured_outputs": {"json": SCHEMA}}, AN_OBJECT),
    ({"structured_outputs": {"choice": ["x"]}}, "x"),
]


@pytest.mark.parametrize(("field", "pattern"), FIELDS, ids=str)
def test_answers_follow_the_format(served: Served, field: dict[str, Any], pattern: str):
    body = {"messages": HI, "max_tokens": 60, "seed": 1, "n": 3, **field}
    status, answer, _ = served.post(CHAT, body)
    assert status == 200, answer
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    streamed = [""] * 3
    for event in served.events(body)[:-1]:
        for choice in json.loads(event)["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts


def test_text_completion_follows_the_format_too(served: Served):
    body = {"prompt": "Hi", "max_tokens": 60, "response_format": JSON_SCHEMA}
    _, answer, _ = served.post("/v1/completions", body)
    assert re.fullmatch(AN_OBJECT, answer["choices"][0]["text"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": JSON_SCHEMA, "grammar": NUMBER}, "grammar"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"grammar": "nothing"}, "grammar"),
        ({"guided_json": [1]}, "guided_json"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs"),
        ({"response_format": JSON_SCHEMA, "ignore_eos": True}, "response_format"),
    ],
    ids=str,
)
def test_format_that_is_wrong_is_a_400(served: Served, fields: dict[str, Any], param: str):
    status, answer, _ = served.post(CHAT, {"messages": HI, **fields})
    assert status == 400
    assert answer["error"]["param"] == param
