"""The process that leads a team: it tells the others what its engine does."""

from __future__ import annotations

import logging
import pickle
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from phicore.backend import ProcessGroup
from phicore.engine.sequence import Output
from phicore.engine.sequence import Sequence as Running
from phicore.errors import ArgumentError
from phicore.progress import Progress
from phicore.team import ending
from phicore.team.member import Member
from phicore.team.protocol import (
    Hello,
    at_once,
    checked_address,
    hang_up,
    key,
    library_address,
    packed,
)

log = logging.getLogger(__name__)
T = TypeVar("T")
GONE = "it is gone"
REASON_S = 2.0
"""A process ends within this time after it has said why."""


class Leader(Member):
    """Leads the other processes, which must be started with `phicore join`.

    If one of them ends before it is told to, this process ends, too: its devices would wait for
    ever.
    """

    def __init__(
        self, coordinator: str, processes: int, settings: dict[str, Any], progress: Progress
    ) -> None:
        """Wait until all other processes have come.

        Args:
            coordinator: The address to listen at, HOST:PORT. The tensor library uses the next port.
            processes: The number of processes, this one included.
            settings: The arguments of `phicore.load`, for the others.
            progress: Called with the number of processes that are there.
        Raises:
            ArgumentError: If there is no key, or the address cannot be used.
        """
        super().__init__()
        host, port = checked_address(coordinator)
        self.group = ProcessGroup(library_address(host, port), processes, 0)
        self._others: list[Connection] = []
        self._numbers: WeakKeyDictionary[Running, int] = WeakKeyDictionary()
        self._added = 0
        self._is_quiet = self._is_closed = False
        secret = key()
        try:
            listener = Listener((host, port), authkey=secret, backlog=processes)
        except OSError as error:
            problem = f"cannot listen at {coordinator}: {error.strerror or error}"
            raise ArgumentError(problem, parameter="coordinator") from None
        with listener:
            while len(self._others) < processes - 1:
                progress("processes", len(self._others) + 1, processes)
                try:
                    found = listener.accept()
                except AuthenticationError:
                    log.warning("a process that has another key was turned away")
                    continue
                except (EOFError, OSError):  # it went away at once
                    continue
                at_once(found)
                number = len(self._others) + 1
                hello = Hello(number, processes, version("phicore"), settings)
                found.send_bytes(pickle.dumps(hello))
                self._others.append(found)
        progress("processes", processes, processes)
        for number, other in enumerate(self._others, 1):
            watch = threading.Thread(target=self._watch, args=(number, other), daemon=True)
            watch.start()

    def _watch(self, number: int, other: Connection) -> None:
        """Wait for what a process says, which is why it must end, or until it is gone."""
        problem = ""
        try:
            problem = other.recv_bytes().decode(errors="replace")
            other.poll(REASON_S)  # it ends, and should do so before this process
        except (EOFError, OSError):
            problem = problem or GONE
        if not self._is_closed:
            ending.end(f"process {number} of the team: {problem}")

    def abandon(self) -> None:
        super().abandon()
        self._is_closed = True
        for other in self._others:
            hang_up(other)

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._send("end")
            super().close()

    def _send(self, *message: Any) -> None:
        data = packed(message)
        for number, other in enumerate(self._others, 1):
            try:
                other.send_bytes(data)
            except OSError:
                if not self._is_closed:
                    time.sleep(REASON_S)
                    ending.end(f"process {number} of the team: {GONE}")

    # ---- what the engine tells -------------------------------------------------------------

    def added(self, sequence: Running) -> None:
        if self._is_quiet:
            return
        number = self._added
        request = replace(sequence.request, tools=None, stop=())  # those concern the text
        self._send("add", number, request)
        self._added += 1
        self._numbers[sequence] = number

    def aborted(self, sequence: Running) -> None:
        if sequence in self._numbers and not self._is_quiet:
            self._send("abort", self._numbers[sequence])

    def step(self, run: Callable[[], list[Output]]) -> list[Output]:
        if self._is_quiet:
            return run()
        self._send("step")
        outputs = self._guarded(run)
        self._send("stepped", checksum(outputs))
        return outputs

    def call(self, name: str, args: tuple[Any, ...], run: Callable[[], T]) -> T:
        self._send("call", name, args)
        self._is_quiet = True
        try:
            return self._guarded(run)
        finally:
            self._is_quiet = False

    def _guarded(self, run: Callable[[], T]) -> T:
        """Run what the others run, too. An interrupt ends them, since they would go on without."""
        try:
            return run()
        except (KeyboardInterrupt, SystemExit):
            self.abandon()
            raise

    def agreed(self, value: T) -> T:
        self._send("agreed", value)
        return value


def checksum(outputs: Sequence[Output]) -> int:
    """Return a number that differs if the tokens of a step differ."""
    told = [(output.tokens, output.finish_reason) for output in outputs]
    return zlib.crc32(repr(told).encode())
