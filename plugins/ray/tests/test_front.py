"""The layer around Ray's proxy: sessions, and what clients get in place of Ray's errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from phicore_ray.front import MOST_READ, Front, session_of

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?"},
]


def session(**fields: Any) -> str | None:
    return session_of(json.dumps(fields).encode())


def test_turns_of_a_conversation_have_one_session_and_others_have_another():
    first = session(messages=TURNS[:2], seed=1)
    assert first is not None
    assert session(messages=TURNS, seed=2, stream=True) == first
    assert session(messages=[TURNS[0], TURNS[3]]) != first
    assert session(messages=TURNS[:2], prompt_cache_key="a") != first
    assert session(messages=TURNS, prompt_cache_key="a") == session(prompt_cache_key="a", prompt="")


def test_completions_have_the_beginning_of_the_prompt_as_their_session():
    text = "word " * 100
    assert session(prompt=text) == session(prompt=text + "more") != session(prompt="more" + text)
    assert session(prompt=[text]) == session(prompt=text)
    tokens = list(range(300))
    assert session(prompt=tokens) == session(prompt=[*tokens, 5]) != session(prompt=tokens[1:])
    assert session(prompt=[tokens]) == session(prompt=tokens)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"messages": []}', b'{"prompt": ""}', b'{"prompt": 5}', b"\xff"],
)
def test_body_without_a_beginning_has_no_session(body: bytes):
    assert session_of(body) is None


def answer(
    application: Any, body: bytes, path: str = "/v1/completions", parts: int = 1, **headers: str
) -> list[dict[str, Any]]:
    """Return the messages that a client gets through the layer."""
    size = -(-len(body) // parts)
    chunks = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
    messages = [
        {"type": "http.request", "body": each, "more_body": i + 1 < len(chunks)}
        for i, each in enumerate(chunks)
    ]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "path": path,
        "method": "POST",
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }
    asyncio.run(Front(application)(scope, receive, send))
    return sent


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the session and the body."""
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    sessions = [value for name, value in scope["headers"] if name == b"x-session-id"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"|".join([*sessions, body])})


@pytest.mark.parametrize("parts", [1, 3])
def test_replica_gets_the_whole_body_and_the_session(parts: int):
    body = json.dumps({"messages": TURNS}).encode()
    expected = session_of(body)
    assert expected is not None
    assert answer(echo, body, parts=parts)[1]["body"] == expected.encode() + b"|" + body
    assert answer(echo, body, x_session_id="mine")[1]["body"] == b"mine|" + body
    assert answer(echo, body, "/v1/tokenize")[1]["body"] == body


def test_body_that_is_large_passes_without_a_session():
    body = json.dumps({"prompt": "x" * MOST_READ}).encode()
    assert answer(echo, body, parts=5)[1]["body"] == body


def test_body_that_never_ends_is_cut_off(monkeypatch: pytest.MonkeyPatch):
    """The first part is looked at, the rest only counted."""
    monkeypatch.setattr("phicore_ray.front.PATIENCE_S", 0.05)
    monkeypatch.setattr("phicore_ray.front.MOST_BODY", 2 * MOST_READ)
    part = {"type": "http.request", "body": b"x" * MOST_READ, "more_body": True}
    sent: list[Any] = []
    seen: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never() -> Any:
        await asyncio.sleep(60)

    async def always() -> Any:
        return part

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            seen.append(message["type"])

    scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
    asyncio.run(Front(reads)(dict(scope), never, send))
    assert sent[0]["status"] == 408
    asyncio.run(Front(reads)(dict(scope), always, send))
    assert len(seen) == 2


@pytest.mark.parametrize("body", [b"[" * 100000, b'{"messages": ' * 100000], ids=["list", "object"])
def test_body_that_is_nested_deeply_has_no_session(body: bytes):
    assert session_of(body) is None


def raying(status: int, text: str) -> Any:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    return application


@pytest.mark.parametrize(
    ("status", "text", "told", "code"),
    [
        (503, "Request dropped due to backpressure (num_queued_requests=1)", 503, "queue_full"),
        (404, "Path '/v1/completions' not found.", 503, "not_served"),
        (408, "Request 5 timed out after 3s.", 408, "proxy_error"),
    ],
)
def test_errors_of_ray_are_objects(status: int, text: str, told: int, code: str):
    start, body = answer(raying(status, text), b"{}")
    assert start["status"] == told
    assert json.loads(body["body"])["error"]["code"] == code
    assert ((b"retry-after", b"2") in start["headers"]) == (told == 503)


async def silent(scope: Any, receive: Any, send: Any) -> None:
    """End as Ray's proxy does when a replica dies before it has answered."""


async def torn(scope: Any, receive: Any, send: Any) -> None:
    """End as Ray's proxy does when a replica dies amid a stream."""
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})


def test_answer_of_a_dead_replica_is_an_error():
    start, body = answer(silent, b"{}")
    assert start["status"] == 503
    assert json.loads(body["body"])["error"]["code"] == "replica_gone"


def test_stream_of_a_dead_replica_ends_with_an_error():
    *_, last = answer(torn, b"{}")
    assert not last["more_body"]
    data = last["body"].decode().removeprefix("data: ")
    assert json.loads(data)["error"]["code"] == "replica_gone"
