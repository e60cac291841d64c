"""Runs the server in this process: sockets, signals, and how the process ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from phicore.server.errors import stopping
from phicore.server.plan import Plan
from phicore.server.service import Service
from phicore.server.settings import Settings

LINGER_S = 2.0
"""After the grace time, connections have this time to send what is left."""


class Protocol(H11Protocol):
    """A connection that is closed if the head of a request does not come in time.

    So is one whose request was answered before its body has come. uvicorn itself waits for both
    without end.
    """

    patience_s = 60.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        """Start the clock when a head begins, or a connection; stop it when the head is there."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        # An error may be told before the body is there, whose rest could then take for ever.
        has_rest = self.conn.their_state is h11.SEND_BODY
        is_idle = self.cycle is not None and not self.conn.trailing_data[0] and not has_rest
        if is_answering or is_idle:  # uvicorn closes idle connections
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        elif self._timer is None:
            self._timer = self.loop.call_later(self.patience_s, self.transport.close)


class Server(uvicorn.Server):
    """A server that finishes what runs when it gets SIGTERM or Ctrl-C.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, grace_s: float) -> None:
        super().__init__(config)
        self._service = service
        self._grace_s = grace_s
        self.signals: list[int] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals in the event loop. Unlike uvicorn, this does not send them again."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: loop.call_soon_threadsafe(self.stop, n))
        yield

    def stop(self, number: int = 0) -> None:
        """Begin to end; the second time, end at once."""
        if number:
            self.signals.append(number)
        if self.should_exit:
            self.force_exit = True
            self._service.end_all(stopping())
            return
        self.should_exit = True
        self._service.begin_stop()
        loop = asyncio.get_running_loop()
        loop.call_later(self._grace_s, self._service.end_all, stopping())


def run(listening: socket.socket, plan: Plan) -> None:
    """Serve until a signal comes.

    Raises:
        KeyboardInterrupt: If the signal was Ctrl-C.
        BaseException: The error because of which the model cannot be loaded or used.
    """
    _let_the_system_end_dead_connections(listening, plan.settings.patience)
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(server.stop)

    settings = plan.settings
    application = plan.application(failed)
    service: Service = application.state.service
    server = Server(_config(application, settings), service, settings.grace)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        _say(f"listening at {_url(listening)}")
        runner.run(server.serve(sockets=[listening]))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if service.is_alive else signal.SIG_DFL)
    was_interrupted = signal.SIGINT in server.signals
    if service.is_alive and not failures:
        # The model is still being loaded or computes, and a library cannot be told to stop.
        sys.stderr.flush()
        os._exit(130 if was_interrupted else 0)
    if failures:
        raise failures[0]
    if was_interrupted:
        raise KeyboardInterrupt


def _config(application: Starlette, settings: Settings) -> uvicorn.Config:
    protocol = type("Protocol", (Protocol,), {"patience_s": settings.patience})
    return uvicorn.Config(
        application,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.grace + LINGER_S) + 1,
        timeout_keep_alive=75,  # longer than that of proxies, which would use a closed connection
        h11_max_incomplete_event_size=64 * 1024,
    )


def _let_the_system_end_dead_connections(listening: socket.socket, patience_s: float) -> None:
    """Let connections end whose other side is gone or does not read; they inherit the options."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    milliseconds = int(1000 * patience_s)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_USER_TIMEOUT", milliseconds)):  # Linux
        if hasattr(socket, name):
            listening.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _say(line: str) -> None:
    sys.stderr.write(f"phicore serve: {line}\n")
    sys.stderr.flush()
