"""Answers of HTTP that end when the client goes away: streams of events, and single objects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phicore.server.errors import ApiError

PING = b": keep-alive\n\n"
"""A comment, which clients ignore."""
DONE = b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    """Return an event whose data is an object of JSON."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


class GoneError(ApiError):
    """The client has gone away, so nobody sees this error."""

    def __init__(self) -> None:
        super().__init__("the client has closed the connection", status=499)


@asynccontextmanager
async def watching(receive: Receive, on_gone: Callable[[], None]) -> AsyncIterator[None]:
    """Call a function if the client goes away, for as long as the context lasts.

    Args:
        receive: Returns messages of ASGI; the body must have been read.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_gone()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class EventStream(Response):
    """A stream of events. It ends, and the events are closed, when the client goes away.

    An error among the events is sent as an event, since the status was sent long ago.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        on_gone: Callable[[], None],
        patience_s: float,
        log: Callable[[ApiError], None] = lambda error: None,
    ) -> None:
        """Make the answer.

        Args:
            events: The events.
            on_gone: Called if the client goes away or does not read; the events must then end.
            patience_s: How long the client may take to read what fills the connection's buffers.
            log: Called with the error that has ended the stream.
        """
        self.status_code = 200
        self.background = None
        self._events = events
        self._on_gone = on_gone
        self._patience_s = patience_s
        self._log = log
        self.body = b""
        self.init_headers(
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",
            }
        )

    def init_headers(self, headers: Any = None) -> None:
        """Store the headers. A stream has no content-length."""
        pairs = (headers or {}).items()
        self.raw_headers = [(name.encode(), value.encode()) for name, value in pairs]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, *, is_last: bool = False) -> None:
            message = {"type": "http.response.body", "body": data, "more_body": not is_last}
            async with asyncio.timeout(self._patience_s):
                await send(message)

        is_complete = False
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            async with watching(receive, self._on_gone):
                await send(start)
                try:
                    async for data in self._events:
                        await write(data)
                except ApiError as error:
                    self._log(error)
                    if error.status != 499:
                        await write(event(error.body))
                await write(b"", is_last=True)
                is_complete = True
        except TimeoutError:
            self._log(ApiError("the client does not read", status=408))
        except OSError:  # some servers tell thus that the client has gone
            pass
        finally:
            if not is_complete:
                self._on_gone()
            await self._events.aclose()  # type: ignore[attr-defined]  # a generator


async def unless_gone(receive: Receive, result: Awaitable[Any], on_gone: Callable[[], None]) -> Any:
    """Wait for a result while the client is there; if it goes away, call a function."""
    async with watching(receive, on_gone):
        return await result
