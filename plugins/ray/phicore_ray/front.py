"""A layer around Ray's HTTP proxy: sessions for the router, and errors as OpenAI's clients expect.

Ray's proxies load it where the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH is
`phicore_ray.front:layers` when Ray starts. `phicore ray-serve` sets it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

from ray.serve._private.constants import SERVE_SESSION_ID
from ray.serve._private.http_util import _matches_session_id_header as is_session
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phicore.server.errors import ApiError
from phicore.server.guards import refusal
from phicore.server.streams import event

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
LAYERS = "phicore_ray.front:layers"
PATHS = ("/chat/completions", "/completions")
MOST_READ = 4 * 2**20
"""A body of more bytes is not looked at."""
MOST_BODY = 64 * 2**20
"""A client that sends more bytes counts as gone; replicas refuse much smaller bodies."""
PATIENCE_S = 60.0
"""How long a client may take to send the part of its request that is looked at, in seconds."""
BEGINNING = 256
"""The session of a completion is the first characters or tokens of its prompt, so many."""


def layers() -> list[Middleware]:
    """Return the layers for Ray's proxy."""
    return [Middleware(Front)]


class Front:
    """Gives requests for answers a session, and ends answers whose replica is gone with an error.

    Args:
        app: Ray's proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or not scope["path"].endswith(PATHS):
            await self._app(scope, receive, send)
            return
        if not any(is_session(name.decode("latin-1")) for name, _ in scope["headers"]):
            try:
                scope, receive = await _with_session(scope, receive)
            except ApiError as error:
                await refusal(error)(scope, receive, send)
                return
        reply = _Reply(send)
        try:
            await self._app(scope, receive, reply.send)
        finally:
            await reply.finish(scope, receive)


async def _with_session(scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
    """Read the body, and return the request with the header of its session, if it has one.

    Raises:
        ApiError: If the body comes too slowly.
    """
    messages: list[Message] = []
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = await receive()
                messages.append(message)
                body += message.get("body", b"")
                if not message.get("more_body") or len(body) > MOST_READ:
                    break
    except TimeoutError:
        raise ApiError("the body comes too slowly", status=408) from None
    size = len(body)

    async def again() -> Message:
        nonlocal size
        if messages:
            return messages.pop(0)
        message = await receive()
        size += len(message.get("body", b""))
        return message if size <= MOST_BODY else {"type": "http.disconnect"}

    found = None if len(body) > MOST_READ else session_of(bytes(body))
    if found is not None:
        header = (SERVE_SESSION_ID.encode(), found.encode())
        scope = {**scope, "headers": [*scope["headers"], header]}
    return scope, again


def session_of(body: bytes) -> str | None:
    """Return what requests have in common whose prompts begin the same way.

    This is the field `prompt_cache_key` of OpenAI's API; else the messages up to the first of the
    user, which all turns of a conversation share; else the beginning of the prompt. None means
    that the body has none of these.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    key, messages, prompt = (fields.get(k) for k in ("prompt_cache_key", "messages", "prompt"))
    beginning: Any
    if isinstance(key, str) and key:
        beginning = key
    elif isinstance(messages, list) and messages:
        roles = [each.get("role") if isinstance(each, dict) else None for each in messages]
        end = roles.index("user") + 1 if "user" in roles else len(roles)
        beginning = messages[:end]
    elif isinstance(prompt, (str, list)) and prompt:
        first = prompt[0] if isinstance(prompt[0], (str, list)) else prompt  # of several
        beginning = (prompt if isinstance(prompt, str) else first)[:BEGINNING]
    else:
        return None
    try:
        text = json.dumps(beginning, sort_keys=True)
    except RecursionError:
        return None
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class _Reply:
    """What a client gets: the replica's messages, and an error in place of what is missing."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_stream = False
        self._has_begun = False
        self._has_ended = False
        self._ray: tuple[int, bytearray] | None = None
        """Status and text of an error that Ray's proxy tells as plain text."""

    async def send(self, message: Message) -> None:
        """Take a message of Ray's proxy."""
        if message["type"] == "http.response.start":
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            kind = headers.get(b"content-type", b"")
            if message["status"] >= 400 and kind.startswith(b"text/plain"):
                self._ray = message["status"], bytearray()
                return
            self._has_begun, self._is_stream = True, kind.startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            if self._ray is not None:
                self._ray[1].extend(message.get("body", b""))
                return
            self._has_ended = not message.get("more_body", False)
        await self._send(message)

    async def finish(self, scope: Scope, receive: Receive) -> None:
        """Tell an error if the answer is not complete."""
        if self._has_ended or (self._has_begun and not self._is_stream):
            return
        if self._has_begun:
            body = event(_gone().body)
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
            return
        error = _gone() if self._ray is None else _as_error(self._ray[0], self._ray[1].decode())
        await refusal(error)(scope, receive, self._send)


def _gone() -> ApiError:
    return ApiError(
        "the replica that computed the answer is gone; send the request again",
        status=503,
        code="replica_gone",
    )


def _as_error(status: int, text: str) -> ApiError:
    """Return what an error of Ray's proxy means for a client."""
    if "backpressure" in text:
        return ApiError("all replicas are busy; try again later", status=503, code="queue_full")
    if status == 404:
        return ApiError("no model is served here", status=503, code="not_served")
    return ApiError(" ".join(text.split()), status=status, code="proxy_error")
