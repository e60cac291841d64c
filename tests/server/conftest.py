"""Fixtures: real servers on real sockets, and OpenAI's own client."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from api.tiny_models import write_endless, write_tiny

import phicore
from phicore import Model
from phicore.server import Settings, app
from phicore.server.service import Service

WAIT_S = 60.0
"""What happens at once may take this long on a slow machine."""
LOADING_S = 600.0
"""Loading may take this long: a warm-up compiles every step, on a machine that others use too."""


class Served:
    """A server that runs in a thread.

    Attributes:
        url: The beginning of its addresses, without a slash at the end.
        service: What its handlers share.
        client: OpenAI's client for it.
    """

    def __init__(self, url: str, service: Service) -> None:
        self.url = url
        self.service = service
        self.client = openai.OpenAI(
            base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=WAIT_S
        )

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Send a body without OpenAI's client; return status, object or text, and headers."""
        return self.ask("POST", path, body, **headers)

    def get(self, path: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
        return self.ask("GET", path, **headers)

    def ask(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        import json
        from http.client import HTTPConnection

        connection = HTTPConnection(*self.address, timeout=WAIT_S)
        data = body if isinstance(body, (bytes, str)) or body is None else json.dumps(body)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, given)
        answer = connection.getresponse()
        content = answer.read()
        found = {name.lower(): value for name, value in answer.getheaders()}
        connection.close()
        is_json = found.get("content-type", "").startswith("application/json")
        return answer.status, json.loads(content) if is_json else content.decode(), found

    def events(self, body: dict[str, Any], path: str = "/v1/chat/completions") -> list[str]:
        """Return the data of all events of a stream."""
        status, text, _ = self.post(path, {**body, "stream": True})
        assert status == 200, text
        lines = [line for line in text.split("\n\n") if line]
        assert all(line.startswith(("data: ", ":")) for line in lines)
        return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]

    def wait_until(self, condition: Callable[[], bool], what: str, wait_s: float = WAIT_S) -> None:
        """Wait until a condition holds.

        Raises:
            AssertionError: If it does not hold in time.
        """
        end = time.monotonic() + wait_s
        while not condition():
            assert time.monotonic() < end, f"{what} did not happen"
            time.sleep(0.005)

    def wait_for_rows(self, count: int) -> None:
        """Wait until this many answers run or wait."""
        self.wait_until(lambda: self.service.worker.count == count, f"{count} answers")

    @property
    def is_free(self) -> bool:
        """Return whether neither the worker nor the engine has an answer."""
        worker = self.service.worker
        return worker.count == 0 and not worker.jobs and worker.model.engine.is_idle


@contextmanager
def serving(model: Model | Callable[[], Model], **options: Any) -> Iterator[Served]:
    """Serve a model on a free port, in a thread, as long as the context lasts."""
    application = app(model, names=["tiny", "other"], **options)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # slow readers fill it soon
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(application, log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    service: Service = application.state.service
    served = Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service)
    try:
        served.wait_until(lambda: server.started, "the start")
        yield served
    finally:
        served.client.close()
        server.should_exit = True
        thread.join(WAIT_S)


@contextmanager
def ready(model: Model | Callable[[], Model], **options: Any) -> Iterator[Served]:
    """Serve a model, and wait until it is there."""
    with serving(model, **options) as served:
        served.wait_until(lambda: served.service.state != "loading", "loading", LOADING_S)
        assert served.service.state == "ready", served.service.failure
        yield served


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def endless_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model whose answers are longer than any test waits."""
    path = tmp_path_factory.mktemp("models") / "endless.gguf"
    return write_endless(path, context=80000)


ENDLESS = {"max_tokens": 15000, "temperature": 0, "repetition_penalty": 1}


@pytest.fixture(scope="session")
def model(tiny_path: Path) -> Iterator[Model]:
    with phicore.load(tiny_path, "jax") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(model: Model) -> Iterator[Served]:
    with ready(model) as found:
        yield found


@pytest.fixture(scope="module")
def endless(endless_path: Path) -> Iterator[Served]:
    """Serve an endless model, two answers at a time and two more in the queue."""
    with (
        phicore.load(endless_path, "numpy", max_sequences=2) as loaded,
        ready(loaded, settings=Settings(max_queue=2)) as found,
    ):
        yield found


HI = [{"role": "user", "content": "Hi"}]
