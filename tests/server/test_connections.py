"""Many connections, many requests on one, and paths that lead elsewhere."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from select import select

import pytest
from server.conftest import HI
from server.test_life import WAIT_S, Process, process

from phicore.server.service import LONG_BODY

resource = pytest.importorskip("resource", reason="limits of POSIX")
IDLE = 1000
PIPELINED = 2000
PATHS = [
    *("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc%2fpasswd", "//etc/passwd"),
    *("/js/../../guards.py", "/js/%2e%2e/%2e%2e/guards.py", "/js/..%5c..%5cguards.py"),
    *("/%252e%252e/guards.py", "/%00", "/js/%00.js", "/%ff", "/js/", "/file:///etc/passwd"),
]


@pytest.fixture(scope="module")
def running(endless_path: Path) -> Iterator[Process]:
    with process("-m", endless_path, "--patience", 300) as made:
        made.wait_until_ready()
        yield made


def connected(running: Process) -> socket.socket:
    host, _, port = running.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=WAIT_S)


def received(connection: socket.socket) -> bytes:
    """Return all that comes until the other side closes."""
    parts = []
    while part := connection.recv(2**16):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.complete
@pytest.mark.parametrize(
    "begun", [b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc"], ids=repr
)
def test_idle_connections_keep_nobody_from_being_answered(running: Process, begun: bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * IDLE if hard == resource.RLIM_INFINITY else min(hard, 2 * IDLE)
    if wanted < IDLE + 100:
        pytest.skip(f"needs {IDLE + 100} open files; `ulimit -n` allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        with ExitStack() as stack:
            for _ in range(IDLE):
                connection = stack.enter_context(connected(running))
                connection.sendall(begun)
            client = stack.enter_context(running.client)
            answer = client.chat.completions.create(model="endless", messages=HI, max_tokens=3)
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.complete
def test_requests_that_come_at_once_on_a_connection_are_all_answered(running: Process):
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with connected(running) as connection:
        connection.sendall(one * PIPELINED + last)
        assert received(connection).count(b"HTTP/1.1 200") == PIPELINED + 1


def test_long_bodies_that_do_not_end_keep_short_requests_from_nothing(running: Process):
    size, many = 4 * 2**20, 40  # 32 bodies of this size are taken

    def begun(count: int) -> socket.socket:
        connection = connected(running)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}"
        with suppress(ConnectionError):  # it is refused meanwhile
            connection.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode() + b" " * count)
        return connection

    with ExitStack() as stack:
        connections = [stack.enter_context(begun(size - 1)) for _ in range(many)]
        refused, _, _ = select(connections, [], [], WAIT_S)
        assert 0 < len(refused) <= many - 32
        client = stack.enter_context(running.client)
        answer = client.chat.completions.create(model="endless", messages=HI, max_tokens=3)
        assert answer.choices
        with begun(LONG_BODY + 1) as connection:
            text = received(connection)
        assert text.startswith(b"HTTP/1.1 503")
        assert b"too many long requests" in text
    end, text = time.monotonic() + WAIT_S, b""
    while not text.startswith(b"HTTP/1.1 400"):  # the server sees soon that the others are gone
        assert time.monotonic() < end
        with begun(size) as connection, suppress(ConnectionError):
            text = received(connection)


@pytest.mark.parametrize("path", PATHS)
def test_path_that_leads_elsewhere_is_not_found(running: Process, path: str):
    with connected(running) as connection:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode())
        answer = received(connection)
    assert answer.split(b"\r\n")[0] in (b"HTTP/1.1 404 Not Found", b"HTTP/1.1 400 Bad Request")
    assert b"root:" not in answer
    assert b"import" not in answer
