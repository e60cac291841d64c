"""Logs of requests, each with an identifier that client and server can name."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phicore.server.errors import api_error, escaped
from phicore.server.guards import refusal

log = logging.getLogger(__name__)

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_QUIET = ("/health", "/metrics")
_METHODS = ("GET", "HEAD", "OPTIONS", "POST")
"""The methods that are counted. Clients may invent others, and each would stay in memory."""
_LONGEST = 200
"""A line of the log has so many characters of a path, which may have 64 thousand."""
request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The identifier of the request that is answered."""


class Requests:
    """Gives each request an identifier, logs and counts it, and turns a fault into an answer.

    Args:
        app: The application.
        responses: Counts the answers by method, path and status.
    """

    def __init__(self, app: ASGIApp, responses: Counter) -> None:
        self._app = app
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        request_id.set(id)
        status, started = 0, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            log.exception("a fault")
            if status:
                raise  # the server must close the connection
            await refusal(api_error(error))(scope, receive, noting)
        finally:
            self._note(scope, status or 499, time.perf_counter() - started)

    def _note(self, scope: Scope, status: int, took_s: float) -> None:
        # The pattern of the route, so that there are few different labels.
        path = getattr(scope.get("route"), "path", None) or "other"
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._responses.labels(method, path, status).inc()
        level = logging.DEBUG if scope["path"] in _QUIET and status < 400 else logging.INFO
        client = scope.get("client")
        fields = {
            "method": method,
            "path": scope["path"][:_LONGEST],
            "status": status,
            "took_ms": round(1000 * took_s, 1),
            "client": client[0] if client else None,
        }
        log.log(level, "request", extra={"fields": fields})


class Lines(logging.Formatter):
    """Formats records as lines of text, or as objects of JSON.

    Args:
        as_json: Whether the lines are objects of JSON.
    """

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        if id := request_id.get():
            fields["request_id"] = id
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self._as_json:
            line = {
                "time": when,
                "level": record.levelname.lower(),
                "message": record.getMessage(),
                **fields,
            }
            return json.dumps(line, default=str)
        # Clients choose some words of a message, such as roles that a template leaves out.
        message = escaped(record.getMessage())
        trace = fields.pop("traceback", None)
        shown = "".join(f" {name}={_shown(value)}" for name, value in fields.items())
        lines = [f"{when} {record.levelname.lower()} {message}{shown}"]
        lines += [] if trace is None else map(escaped, trace.split("\n"))
        return "\n".join(lines)


def _shown(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, default=str)
    # Paths come from clients: a terminal must not obey the characters in them.
    return shown if re.fullmatch(r"[!-~]+", shown) and not {*'"='} & {*shown} else json.dumps(shown)
