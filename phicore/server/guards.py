"""Who may ask: hosts, origins and keys. These are layers around the application."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from phicore.server.errors import ApiError

LOCAL = ("localhost", "testserver")
CLOSED = (
    *("/v1", "/chat", "/completions", "/models", "/tokenize", "/detokenize"),
    *("/apply-template", "/metrics"),
)
"""Paths that need a key begin so. The page needs none, since it asks the user for the key."""


def refusal(error: ApiError) -> JSONResponse:
    """Return the answer that tells an error."""
    return JSONResponse(error.body, error.status, error.headers)


class Hosts:
    """Refuses requests for other hosts, of other sites' pages, and with two lengths.

    A page of the web may let its own name point to this machine, or send a request here without
    being asked; in both cases the browser tells the page's name.

    Args:
        app: The application.
        hosts: The names of this server; "*" allows all. Addresses and localhost are allowed.
        origins: The origins whose pages may ask; "*" allows all.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        self._origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._problem(Headers(scope=scope))) is not None:
            answer = refusal(error)
            if error.status == 400:  # what follows on the connection may be no request
                answer.headers["connection"] = "close"
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _problem(self, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if "content-length" in headers and "transfer-encoding" in headers:
            # A proxy in front may take the other one, and see other requests.
            return ApiError("Content-Length together with Transfer-Encoding", code="bad_request")
        if not self._is_known(_name_of(host)):
            return ApiError(
                f"this server is not {host:.100}; --allowed-host allows another name",
                status=403,
                code="host_not_allowed",
            )
        if origin is None or "*" in self._origins or origin in self._origins:
            return None
        if _split(origin).netloc.lower() == host.lower():
            return None
        return ApiError(
            f"pages of {origin:.100} may not ask this server; --cors-origin allows an origin",
            status=403,
            code="origin_not_allowed",
        )

    def _is_known(self, name: str) -> bool:
        if "*" in self._hosts or name in self._hosts or name in LOCAL:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _name_of(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    return (_split(f"//{host}").hostname or "").lower()


def _split(address: str) -> SplitResult:
    """Return the parts of an address. A malformed one, such as "http://[", has none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


class Keys:
    """Refuses requests without a key.

    Args:
        app: The application.
        keys: The keys. Without any, everybody may ask.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and self._is_closed(scope):
            headers = Headers(scope=scope)
            kind, _, bearer = headers.get("authorization", "").partition(" ")
            given = bearer.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
            if not self._is_known(given):
                problem = "the API key is wrong" if given else "this server needs an API key"
                error = ApiError(problem, status=401, code="invalid_api_key")
                await refusal(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    @staticmethod
    def _is_closed(scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] == "OPTIONS":
            return False
        return any(path == closed or path.startswith(f"{closed}/") for closed in CLOSED)

    def _is_known(self, key: str) -> bool:
        """Compare a key with all keys, in a time that tells nothing about them."""
        digest = _digest(key.encode("latin-1"))  # as it came: headers are read as Latin-1
        found = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(found)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
