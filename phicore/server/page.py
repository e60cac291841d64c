"""The page at `/`: files of the package, which need nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

FOLDER = Path(__file__).parent / "page"
HEADERS = {
    # Trusted types let the browser refuse every way in which a text becomes HTML.
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # the browser asks each time whether a file has changed
}
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""The types of the files. Python takes them from the system, and some say text/plain for .js."""


class Page:
    """Serves the files of a folder; without the folder, there is no page."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._files: ASGIApp | None = None
        if folder.is_dir():
            self._files = StaticFiles(directory=folder, html=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                ending = Path(scope["path"]).suffix or ".html"
                if "content-type" in headers and ending in TYPES:
                    headers["content-type"] = TYPES[ending]
            await send(message)

        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        if self._files is None or scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)
        await self._files(scope, receive, with_headers)
