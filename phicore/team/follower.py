"""A process that follows a leader: its engine does what the leader's does."""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from typing import Any, TypeVar

from phicore.backend import ProcessGroup
from phicore.engine import Engine
from phicore.engine.sequence import Sequence
from phicore.errors import ArgumentError
from phicore.grammar.vocabulary import Vocabulary
from phicore.team import ending
from phicore.team.leader import checksum
from phicore.team.member import Member
from phicore.team.protocol import (
    END,
    Hello,
    at_once,
    checked_address,
    hang_up,
    key,
    library_address,
    unpacked,
)

T = TypeVar("T")
ASK_S = 0.5
"""A leader that is not there yet is asked for again after this time."""


class Follower(Member):
    """Follows a leader.

    If the leader ends before it says so, this process ends, too.

    Attributes:
        settings: The arguments of `phicore.load` that the leader has.
    """

    def __init__(self, coordinator: str, wait_s: float) -> None:
        """Connect to the leader.

        Args:
            coordinator: The leader's address, HOST:PORT.
            wait_s: How long the leader is waited for, in seconds.
        Raises:
            ArgumentError: If the address is wrong, nobody is there, there is no key or the leader
                has another one, or the leader's phicore has another version.
        """
        super().__init__()
        host, port = checked_address(coordinator)
        secret, until = key(), time.monotonic() + wait_s
        while True:
            try:
                self._leader = Client((host, port), authkey=secret)
                break
            except AuthenticationError:
                raise ArgumentError("the leader has another key", parameter="coordinator") from None
            except (EOFError, OSError) as error:
                if time.monotonic() > until:
                    reason = getattr(error, "strerror", None) or "it went away"
                    problem = f"there is no leader at {coordinator}: {reason}"
                    raise ArgumentError(problem, parameter="coordinator") from None
                time.sleep(ASK_S)
        at_once(self._leader)
        hello: Hello = pickle.loads(self._leader.recv_bytes())
        self.group = ProcessGroup(library_address(host, port), hello.count, hello.number)
        self.settings = hello.settings
        if hello.version != version("phicore"):
            problem = f"it has phicore {version('phicore')}, and the leader {hello.version}"
            self.fail(problem)
            raise ArgumentError(problem)
        self._messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._is_ending = False
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        """Receive what the leader says, so that its end is noticed whatever happens here."""
        try:
            while not self._is_ending:
                data = self._leader.recv_bytes()
                if data == END:
                    self._is_ending = True
                self._messages.put(data)
        except (EOFError, OSError):
            if not self._is_ending:
                ending.end("the process that leads the team is gone")

    def fail(self, problem: str) -> None:
        """Tell the leader why this process ends; end it if it has joined the others' devices."""
        self._is_ending = True
        with suppress(OSError):  # it may be gone, too
            self._leader.send_bytes(problem.encode())
        if self.has_joined:
            ending.end(problem)
        self._leader.close()

    def give_up(self) -> None:
        """End the team, since this process was interrupted, or has a fault."""
        self.abandon()
        self._leave, self._is_ending = None, True
        hang_up(self._leader)

    def close(self) -> None:
        self._is_ending = True
        super().close()

    def agreed(self, value: T) -> T:
        kind, found = self._next(_no_vocabulary)
        assert kind == "agreed"
        return found

    def _next(self, vocabulary: Callable[[], Vocabulary]) -> Any:
        return unpacked(self._messages.get(), vocabulary)

    def follow(self, engine: Engine, vocabulary: Callable[[], Vocabulary]) -> None:
        """Let an engine do what the leader's does, until the leader closes its model.

        Args:
            vocabulary: Returns the vocabulary that grammars need.
        """
        running: dict[int, Sequence] = {}
        done = 0
        while True:
            kind, *args = self._next(vocabulary)
            if kind == "add":
                number, request = args
                running[number] = engine.add(request)
            elif kind == "abort":
                engine.abort(running.pop(args[0]))
            elif kind == "step":
                outputs = engine.step()
                done = checksum(outputs)
                for output in outputs:
                    output.sequence.outputs.clear()
                running = {n: s for n, s in running.items() if s.finish_reason is None}
            elif kind == "stepped":
                if args[0] != done:
                    self.fail("its devices have computed other tokens than the leader's")
            elif kind == "call":
                name, arguments = args
                getattr(engine, name)(*arguments)
            else:
                return


def _no_vocabulary() -> Vocabulary:
    raise AssertionError("a value that is agreed has no vocabulary")
