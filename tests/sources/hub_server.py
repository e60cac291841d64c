"""A small Hub on 127.0.0.1 that answers `huggingface_hub`'s requests to list and download files.

Requests for GGUF files are redirected to a second port, as the real Hub redirects large files to
its storage. So tests can see whether a client sends its token there. Every request is recorded.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?")
_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-")


@dataclass
class Repository:
    """The files of one commit, to which the branch `main` points, and the server's behaviour."""

    files: dict[str, bytes]
    commit: str = "c0" * 20
    token: str | None = None  # the token without which files are refused
    status: int | None = None  # the HTTP status with which all requests are answered
    file_status: int | None = None  # the HTTP status with which requests for files are answered
    cut_after: int | None = None  # bytes after which the first connection is closed
    stall: threading.Event | None = None  # the event to wait for after half of a file
    next_commit: str | None = None  # the commit after the first file is sent


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]  # names in lower case


@dataclass
class Hub:
    """The state of the server: repositories by name, requests so far, ports of API and storage."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    port: int = 0
    storage_port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def seen(self, method: str, end: str = "") -> list[Request]:
        return [r for r in self.requests if r.method == method and r.path.endswith(end)]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve a Hub on two loopback ports until the `with` block ends."""

    class Handler(_Handler):
        state = hub

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    hub.port, hub.storage_port = (server.server_address[1] for server in servers)
    threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    timeout = 120  # seconds on one connection, which serves one request (HTTP/1.0)

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.state.requests.append(Request(self.command, path, headers))
        if match := _API.fullmatch(path):
            name, revision, file = match[1], match[2] or "main", None
        elif match := _RESOLVE.fullmatch(path):
            name, revision, file = match[1], match[2], match[3]
        elif path == "/api/agent-harnesses":  # asked once a day, with the first other request
            return self._send(200, {}, b'{"standardEnvVars": [], "harnesses": {}}')
        else:
            return self._error(404, "")
        repository = self.state.repositories.get(name)
        if repository is None:
            return self._error(401, "RepoNotFound")
        if repository.status is not None:
            return self._error(repository.status, "")
        if revision not in ("main", repository.commit):
            return self._error(404, "RevisionNotFound")
        if file is None:
            siblings = [{"rfilename": name} for name in repository.files]
            listing = {"id": name, "sha": repository.commit, "siblings": siblings}
            return self._send(200, {}, json.dumps(listing).encode())
        stored = self.server.server_address[1] == self.state.storage_port
        token = headers.get("authorization")
        if repository.token and token != f"Bearer {repository.token}" and not stored:
            return self._error(401, "GatedRepo")
        if repository.file_status is not None:
            return self._error(repository.file_status, "")
        if file not in repository.files:
            return self._error(404, "EntryNotFound")
        return self._send_file(repository, path, repository.files[file], stored)

    def _send_file(self, repository: Repository, path: str, body: bytes, stored: bool) -> None:
        etag = hashlib.sha256(body).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repository.commit}
        if path.endswith(".gguf") and not stored:
            headers |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(body))}
            headers["Location"] = f"http://127.0.0.1:{self.state.storage_port}{path}"
            return self._send(302, headers, b"")
        if wanted := _RANGE.fullmatch(self.headers.get("Range", "")):
            start = int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return self._send(206, headers, body[start:])
        if self.command == "HEAD":
            return self._send(200, headers, body)
        cut, repository.cut_after = repository.cut_after, None
        if repository.stall:
            self._send(200, headers, body, len(body) // 2)
            repository.stall.wait(self.timeout)
            return None
        self._send(200, headers, body, cut)
        repository.commit = repository.next_commit or repository.commit
        return None

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code} if code else {}, b"")

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
