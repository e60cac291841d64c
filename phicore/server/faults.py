"""Faults of plugins under a server: lines that name the plugin, and a watch on those that block."""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from phicore.plugins import blaming

log = logging.getLogger(__name__)

POLL_S = 1.0
"""How often a step that takes long is looked at."""


def tell(logger: logging.Logger, what: str, error: BaseException, **fields: Any) -> None:
    """Log an error: in one line if it is a plugin's, otherwise with its traceback."""
    extra = {"fields": fields} if fields else None
    if (fault := blaming.fault(error)) is not None:
        logger.error("%s: plugin %s", what, fault, extra=extra)
    else:
        logger.error("%s: %s", what, error, exc_info=error, extra=extra)


def tell_of_threads() -> None:
    """Let errors that end threads be logged; Python itself writes a traceback."""

    def hook(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            name = args.thread.name if args.thread is not None else "?"
            tell(log, f"the thread {name} has ended", args.exc_value)

    threading.excepthook = hook


class Watch:
    """Notices that a plugin keeps the thread that computes, and all answers, waiting.

    The thread calls `begin` and `end` around each step. Another thread looks at its stack when a
    step takes long. Code of the backend may take long, since it compiles.

    Code in C that keeps the interpreter's lock stops the other thread, too. Then a third one, which
    is not Python's, writes the stacks of all threads to standard error (`faulthandler`).

    Args:
        limit_s: How long a plugin may take.
        blocked: Called, in the other thread, once for each step that a plugin blocks.

    Attributes:
        backend: The folder of the backend, once there is one.
        blocker: What blocks the step, for a log; None if nothing does.
    """

    def __init__(self, limit_s: float, blocked: Callable[[], None]) -> None:
        self.backend: Path | None = None
        self.blocker: str | None = None
        self._limit_s = limit_s
        self._blocked = blocked
        self._computing: int | None = None
        self._began_s: float | None = None
        self._lock = threading.Lock()
        self._is_over = threading.Event()

    def start(self) -> None:
        """Watch the calling thread from now on."""
        self._computing = threading.get_ident()
        self._put_off()  # here, since the new thread may not come so far
        threading.Thread(target=self._run, name="phicore-watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no more."""
        self._is_over.set()

    def begin(self) -> None:
        """Note that a step begins."""
        self._began_s = time.monotonic()

    def end(self) -> None:
        """Note that a step has ended."""
        with self._lock:
            blocker, self.blocker, self._began_s = self.blocker, None, None
        if blocker is not None:
            log.warning("%s has returned; answers are computed again", blocker)

    def _put_off(self) -> None:
        """Let the stacks be written unless this is called again within the limit."""
        with suppress(AttributeError, OSError, ValueError, RuntimeError):  # stderr is no file
            faulthandler.dump_traceback_later(self._limit_s)

    def _run(self) -> None:
        try:
            self._look()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        seen: tuple[str, float] | None = None  # a plugin, and since when it is seen
        now_s = time.monotonic()
        while not self._is_over.wait(min(POLL_S, self._limit_s / 4)):
            before_s, began_s, now_s = now_s, self._began_s, time.monotonic()
            if now_s - before_s >= self._limit_s:
                log.error(
                    "no thread could run Python code for %.0f s; "
                    "the stacks of all threads were written meanwhile",
                    now_s - before_s,
                )
            self._put_off()
            if began_s is None or self.blocker is not None or now_s - began_s < self._limit_s / 2:
                seen = None
                continue
            frame = sys._current_frames().get(self._computing or 0)
            found = blaming.running(frame, but=self.backend)
            if found is None:
                seen = None
            elif seen is None or seen[0] != found[0]:
                seen = found[0], now_s
            elif now_s - began_s >= self._limit_s:
                self._tell(began_s, now_s, f"plugin {found[0]} ({found[1]})")

    def _tell(self, began_s: float, now_s: float, blocker: str) -> None:
        """Note what blocks a step, unless the step has ended meanwhile: nothing would clear it."""
        with self._lock:
            if self._began_s != began_s:
                return
            self.blocker = blocker
        log.error(
            "%s has not returned for %.0f s; the answers that waited for it fail",
            blocker,
            now_s - began_s,
        )
        self._blocked()
