"""A terminal for tests: a program in a pseudo-terminal, and the screen that a person would see."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pyte

TIMEOUT_S = 60
LEADER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Makes the terminal that of a new session, and then is the program. (Done by Python between fork
and exec, this would need a fork that JAX warns of.)"""


class Screen(pyte.HistoryScreen):
    """A screen that answers questions about the cursor, as terminals do."""

    def __init__(self, columns: int, lines: int, answer: Callable[[bytes], None]) -> None:
        super().__init__(columns, lines, history=10_000, ratio=1.0)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data.encode())


class Terminal:
    """A program on a terminal.

    Attributes:
        raw: All bytes that the program has written.
    """

    def __init__(self, *args: object, columns: int = 80, lines: int = 24, **env: str) -> None:
        """Start `phicore` with these arguments, and with these changes of the environment."""
        import fcntl
        import struct
        import termios

        self._controller, terminal = pty.openpty()
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
        self.process = subprocess.Popen(
            [sys.executable, "-c", LEADER, sys.executable, "-m", "phicore", *map(str, args)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env={k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
            | {"TERM": "xterm-256color"}
            | env,
            start_new_session=True,
        )
        os.close(terminal)
        self.raw = b""
        self.columns = columns
        self.screen = Screen(columns, lines, self.send_bytes)
        self._stream = pyte.ByteStream(self.screen)

    def send_bytes(self, data: bytes) -> None:
        """Type some bytes."""
        with contextlib.suppress(OSError):  # the program may have ended
            os.write(self._controller, data)

    def send(self, text: str) -> None:
        """Type a text."""
        self.send_bytes(text.encode())

    def enter(self, text: str) -> None:
        """Type a line and press Enter."""
        self.send(f"{text}\r")

    def paste(self, text: str) -> None:
        """Paste a text, as terminals do for programs that have asked for it."""
        self.send(f"\x1b[200~{text}\x1b[201~")

    def lines(self) -> list[str]:
        """Return what was scrolled away and what is on the screen, line by line."""
        rows = [
            *self.screen.history.top,
            *(self.screen.buffer[y] for y in range(self.screen.lines)),
        ]
        found = ["".join(row[x].data for x in range(self.columns)).rstrip() for row in rows]
        while found and not found[-1]:
            found.pop()
        return found

    @property
    def text(self) -> str:
        """Return all lines as one text."""
        return "\n".join(self.lines())

    def read(self, timeout_s: float) -> bool:
        """Read what the program writes; return whether there was something."""
        ready, _, _ = select.select([self._controller], [], [], timeout_s)
        if not ready:
            return False
        try:
            data = os.read(self._controller, 65536)
        except OSError:  # the program has ended
            return False
        self.raw += data
        self._stream.feed(data)
        return bool(data)

    def wait(self, is_there: Callable[[str], Any], what: str = "it") -> None:
        """Read until the screen is as a function wants it."""
        end = time.monotonic() + TIMEOUT_S
        while not is_there(self.text):
            self.read(0.1)
            if time.monotonic() > end or (self.process.poll() is not None and not self.read(0.1)):
                if is_there(self.text):
                    return
                raise AssertionError(f"the terminal never showed {what!r}; it shows:\n{self.text}")

    def wait_for(self, text: str, count: int = 1) -> None:
        """Read until the screen shows a text as often as this."""
        self.wait(lambda shown: shown.count(text) >= count, f"{count} x {text}")

    def wait_for_prompt(self, count: int) -> None:
        """Read until the program waits for input, after so many prompts."""
        self.wait(
            lambda _: (
                sum(line.startswith(">>>") for line in self.lines()) >= count
                and self.screen.buffer[self.screen.cursor.y][0].data == ">"
                and self.screen.cursor.x >= 4
            ),
            f"prompt {count}",
        )

    def end(self) -> int:
        """Wait until the program ends, and return its exit code."""
        end = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < end:
            self.read(0.1)
        while self.read(0.1):
            pass
        return self.process.wait(timeout=1)

    def hang_up(self) -> None:
        """Close the terminal, as a window that is closed does."""
        os.close(self._controller)
        self._controller = -1

    def close(self) -> None:
        """End the program if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self._controller >= 0:
            os.close(self._controller)


@contextlib.contextmanager
def terminal(*args: object, **options: Any) -> Iterator[Terminal]:
    """Return a context in which `phicore` runs on a terminal."""
    found = Terminal(*args, **options)
    try:
        yield found
    finally:
        found.close()
