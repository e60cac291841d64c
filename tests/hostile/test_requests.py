"""Bodies that no program would send, to every route: no status 500, no lost server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from api.tiny_models import write_tiny
from hostile.conftest import HANG_S, tries, watched
from hostile.test_constraints import SCHEMAS
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

import phicore
from phicore.server import Settings, app

ROUTES = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/apply-template"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    path = write_tiny(tmp_path_factory.mktemp("m") / "tiny.gguf")
    settings = Settings(max_answer=2, time_limit=HANG_S)  # what hangs gets status 504
    with (
        phicore.load(path, "numpy") as model,
        TestClient(app(model, names=["tiny"], settings=settings)) as client,
    ):
        while client.get("/health").status_code == 503:
            pass
        yield client


def send(client: TestClient, route: str, body: Any) -> int:
    """Send a body; return the status, which is an answer or an error with one line."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
    with watched("requests"):
        answer = client.post(route, content=data)
    assert answer.status_code in (200, 400, 404, 413), (answer.status_code, answer.text[:500])
    if answer.status_code != 200:
        message = answer.json()["error"]["message"]
        assert "\n" not in message
        assert len(message) < 1000
    return answer.status_code


def nested(size: int, key: str = "a") -> str:
    return f'{{"{key}":' * size + "1" + "}" * size


DEEP = (300, 900)
HI = '"messages": [{"role": "user", "content": "Hi"}]'
BODIES = [
    *(f'{{{HI}, "chat_template_kwargs": {nested(size)}}}' for size in (100, 300, 450, 900, 5000)),
    *(f'{{{HI}, "documents": [{nested(size)}]}}' for size in (100, 300, 450, 900)),
    *(f'{{{HI}, "response_format": {nested(size)}}}' for size in (100, 450, 900)),
    *(f'{{{HI}, "guided_json": {nested(size, "items")}}}' for size in (100, 450, 900)),
    *(
        f'{{{HI}, "tools": [{{"type": "function", "function": {{"name": "f", "parameters": '
        f"{nested(size, 'items')}}}}}]}}"
        for size in (50, 100, 300, 450, 900)
    ),
    *(
        f'{{"messages": [{{"role": "user", "content": "a", "x": {nested(s)}}}]}}'
        for s in (300, 900)
    ),
    *(
        f'{{"messages": [{{"role": "assistant", "content": null, "tool_calls": [{{"id": "a", '
        f'"type": "function", "function": {{"name": "f", "arguments": {arguments}}}}}]}}]}}'
        for arguments in (nested(450), nested(900), json.dumps(nested(900)), json.dumps("[" * 9999))
    ),
    f'{{{HI}, "n": 128, "max_tokens": 1}}',
    f'{{{HI}, "stop": {json.dumps(["a" * 1000] * 16)}}}',
    f'{{{HI}, "seed": 1e400}}',
    f'{{{HI}, "seed": {"9" * 5000}}}',
    f'{{{HI}, "temperature": {"9" * 4000}}}',
    f'{{{HI}, "logit_bias": {{"1": {"9" * 400}}}}}',
    f'{{{HI}, "top_p": -0.0, "min_p": 1e-320}}',
    f'{{{HI}, "prediction": {{"type": "content", "content": {json.dumps("a" * 10**5)}}}}}',
    f'{{{HI}, "guided_choice": {json.dumps(["(" * 1000] * 1000)}}}',
    '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    '{"messages": [{"role": "\\ud800", "content": "a"}]}',
    '{"prompt": "\\udfff\\ud800", "stop": "\\ud800"}',
    '{"content": "\\ud800"}',
    '{"prompt": "a", "tokens": [true, 1.0, 1e3]}',
    '{"tokens": [1, 99999999999999999999]}',
    f'{{"prompt": [{", ".join(["[1]"] * 500)}]}}',
    f'{{"prompt": {json.dumps("<|end|>" * 50000)}}}',
    f'{{"prompt": {json.dumps("a " * 500000)}, "content": null}}',
    f'{{"content": {json.dumps("é" * 500000)}}}',
    f'{{"messages": [{", ".join([json.dumps({"role": "user", "content": "a"})] * 4000)}]}}',
    f'{{"model": {json.dumps("x" * 10**5)}}}',
    "[" * 100000,
    '{"a": ' * 100000,
    f'{{"a": {"1" * 100000}}}',
    "{" + ", ".join(f'"k{i}": 1' for i in range(50000)) + "}",
    b"\xff\xfe\x00",
    b"\xef\xbb\xbf{}",
    b"{}\x00",
]


@pytest.mark.parametrize("route", ROUTES)
def test_hostile_body_is_answered_or_refused_in_a_line(client: TestClient, route: str):
    for body in BODIES:
        send(client, route, body if isinstance(body, bytes) else body.encode())


FIELDS = [
    *("messages", "prompt", "content", "tokens", "model", "tools", "tool_choice", "stop", "seed"),
    *("response_format", "guided_json", "guided_regex", "guided_grammar", "guided_choice", "n"),
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "logit_bias", "logprobs", "echo"),
    *(
        "top_logprobs",
        "stream_options",
        "chat_template_kwargs",
        "documents",
        "prediction",
        "format",
    ),
    *("repetition_penalty", "repeat_last_n", "presence_penalty", "stop_token_ids", "ignore_eos"),
    *("with_pieces", "add_special", "parallel_tool_calls", "structured_outputs", "speculation"),
]
KEYS = [*FIELDS, "role", "type", "function", "name", "parameters", "arguments", "tool_calls", "id"]
KEYS += ["text", "tool_call_id", "json_schema", "schema", "strict", "title", "refusal", "thinking"]
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(
        ["user", "assistant", "system", "tool", "function", "text", "auto", "required"]
    ),
    st.sampled_from(["json_object", "json_schema", "\ud800", "<|end|>", "{}", "[1]", "none", "f"]),
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=10,
)
TEXTS = st.one_of(st.text(max_size=10), st.none(), VALUES)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": TEXTS, "arguments": TEXTS})},
        optional={"id": TEXTS, "type": st.sampled_from(["function", "x", None])},
    ),
    max_size=2,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "x"])},
        optional={"content": TEXTS, "tool_calls": CALLS, "tool_call_id": TEXTS, "name": TEXTS},
    ),
    max_size=4,
)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "function": st.fixed_dictionaries(
                {"name": st.sampled_from(["f", "g", "", "é\n"])},
                optional={"parameters": st.one_of(SCHEMAS, VALUES), "strict": VALUES},
            )
        },
        optional={"type": st.sampled_from(["function", "x"])},
    ),
    max_size=2,
)
BODY = st.fixed_dictionaries(
    {"max_tokens": st.just(1)},
    optional={
        "messages": st.one_of(MESSAGES, VALUES),
        "prompt": st.one_of(st.text(max_size=10), VALUES),
        "tools": st.one_of(TOOLS, VALUES),
        "tool_choice": st.one_of(st.sampled_from(["auto", "required", "none"]), VALUES),
        "response_format": VALUES,
        "guided_json": st.one_of(SCHEMAS, VALUES),
    },
)


@tries(40)
@given(st.sampled_from(ROUTES), BODY, st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_random_body_is_answered_or_refused_in_a_line(
    client: TestClient, route: str, body: dict[str, Any], more: dict[str, Any]
):
    more.pop("stream", None)
    send(client, route, {**body, **more})


@tries(25)
@given(st.sampled_from(ROUTES), st.binary(max_size=60))
def test_random_bytes_are_refused_in_a_line(client: TestClient, route: str, body: bytes):
    send(client, route, body)
