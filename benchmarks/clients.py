"""A client of HTTP for the benchmarks of servers: small, on asyncio, with the times of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit


class Connection:
    """A connection for one request.

    Args:
        url: The beginning of the server's addresses.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._path = parts.path.rstrip("/")
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def send(self, method: str, path: str, body: bytes = b"", length: int = -1) -> None:
        """Send a request.

        Args:
            length: What the header says about the body; -1 is the truth.
        """
        length = len(body) if length < 0 else length
        head = (
            f"{method} {self._path}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n"
            "Connection: close\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        await self._writer.drain()

    async def head(self) -> int:
        """Read the head of the answer; return the status."""
        line = await self._reader.readline()
        if not line:
            raise ConnectionError("the server has closed the connection without an answer")
        self.status = int(line.split()[1])
        while (line := await self._reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()
        return self.status

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the body as it comes."""
        if self.headers.get("transfer-encoding") != "chunked":
            yield await self._reader.read(-1)
            return
        while size := int((await self._reader.readline()).split(b";")[0] or b"0", 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)

    async def read_slowly(self, size: int) -> bytes:
        """Read a few bytes of what has come."""
        return await self._reader.read(size)

    async def events(self) -> AsyncIterator[Any]:
        """Yield the objects of a stream of events; the last one, [DONE], is left out."""
        rest = b""
        async for part in self.parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                data = line.strip().removeprefix(b"data:").strip()
                if line.startswith(b"data:") and data != b"[DONE]":
                    yield json.loads(data)

    async def json(self) -> Any:
        """Return the object of the body."""
        return json.loads(b"".join([part async for part in self.parts()]))


async def post(url: str, path: str, body: Any) -> tuple[int, Any]:
    """Send an object; return the status and the object of the answer."""
    async with Connection(url) as connection:
        await connection.send("POST", path, json.dumps(body).encode())
        await connection.head()
        return connection.status, await connection.json()


@contextlib.contextmanager
def served(*options: str, log: Any = subprocess.DEVNULL) -> Iterator[tuple[str, int]]:
    """Run `phicore serve` on a free port until it is no longer needed.

    Yields:
        The beginning of its addresses, and the number of the process.
    """
    command = [sys.executable, "-m", "phicore", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = ""
        for line in process.stderr:
            if found := re.search(r"listening at (http://\S+)", line):
                url = found[1]
                break
        while process.poll() is None and asyncio.run(_status(url, "/health")) != 200:
            time.sleep(0.2)
        if process.poll() is not None:
            raise SystemExit(f"phicore serve has ended with {process.returncode}")
        drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
        yield url, process.pid
        drain.terminate()
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def command_at(command: list[str], url: str) -> Iterator[None]:
    """Run another server until it is no longer needed; it is there once it lists its models."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 300
        while asyncio.run(_status(url, "/v1/models")) != 200:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{' '.join(command)}: it does not answer at {url}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(60)


async def _status(url: str, path: str) -> int:
    """Return the status of an answer, 0 if there is none."""
    try:
        async with Connection(url) as connection:
            await connection.send("GET", path)
            return await connection.head()
    except OSError:
        return 0
