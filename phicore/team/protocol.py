"""Messages between the processes of a team, and their connections.

A connection is one of `multiprocessing.connection`: both ends prove that they know a key, and then
messages are pickled. So whoever knows the key may run code in all processes. Nothing is encrypted.
"""

from __future__ import annotations

import io
import os
import pickle
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from phicore.errors import ArgumentError
from phicore.grammar.vocabulary import Vocabulary

KEY = "PHICORE_TEAM_KEY"
"""The environment variable with the key that the processes share."""
VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class Hello:
    """What a leader tells a process that comes.

    Attributes:
        number: The number of the process that comes, 1 or more.
        count: The number of processes.
        version: The version of the leader's phicore.
        settings: The arguments of `phicore.load`.
    """

    number: int
    count: int
    version: str
    settings: dict[str, Any]


def key() -> bytes:
    """Return the key that the processes share.

    Raises:
        ArgumentError: If there is none.
    """
    found = os.environ.get(KEY, "")
    if not found:
        raise ArgumentError(
            f"the processes of a team need a key; set {KEY} to the same secret for each of them"
        )
    return found.encode()


def checked_address(text: str) -> tuple[str, int]:
    """Return the host and the port of an address.

    Raises:
        ArgumentError: If it has another form than HOST:PORT.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        expected = "HOST:PORT, with a port from 1 to 65534"
        raise ArgumentError(parameter="coordinator", expected=expected, got=text)
    return host.strip("[]"), int(port)


def library_address(host: str, port: int) -> str:
    """Return where the tensor library's own processes meet: at the next port."""
    return f"[{host}]:{port + 1}" if ":" in host else f"{host}:{port + 1}"


def at_once(connection: Connection) -> None:
    """Let a connection send each message at once, since the others wait for it."""
    with suppress(OSError), _socket_of(connection) as found:
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def hang_up(connection: Connection) -> None:
    """End a connection, also for a thread of this process that waits for a message."""
    with suppress(OSError), _socket_of(connection) as found:
        found.shutdown(socket.SHUT_RDWR)


def _socket_of(connection: Connection) -> socket.socket:
    return socket.socket(fileno=os.dup(connection.fileno()))


def packed(message: Any) -> bytes:
    """Return a message as bytes. Vocabularies are not in it, since each process has its own.

    Raises:
        ArgumentError: If something in it cannot be pickled.
    """
    file = io.BytesIO()
    try:
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(message)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ArgumentError(f"this request cannot be told to other processes: {error}") from None
    return file.getvalue()


def unpacked(data: bytes, vocabulary: Callable[[], Vocabulary]) -> Any:
    """Return the message in some bytes.

    Args:
        vocabulary: Returns the vocabulary of this process.
    """
    return _Unpickler(data, vocabulary).load()


END = pickle.dumps(("end",), pickle.HIGHEST_PROTOCOL)
"""The last message."""


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> str | None:
        return VOCABULARY if isinstance(obj, Vocabulary) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, vocabulary: Callable[[], Vocabulary]) -> None:
        super().__init__(io.BytesIO(data))
        self._vocabulary = vocabulary

    def persistent_load(self, pid: str) -> Any:
        return self._vocabulary()
