"""Signals of `phicore chat`: they end an answer, or the chat, in order."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

ENDING = ("SIGTERM", "SIGHUP")
"""The signals that end a chat."""


@contextmanager
def handled(names: Sequence[str], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let a function handle signals. Those that the system lacks, or that are ignored, stay so."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    used = [n for n in numbers if before[n] not in (signal.SIG_IGN, None)]
    for number in used:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in used:
            signal.signal(number, before[number])


class Stop:
    """What has asked an answer to stop.

    Attributes:
        number: The number of the signal; None if there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note the first signal, and raise KeyboardInterrupt at the second.

        So the engine is not left in the middle of a step, unless the user insists.
        """
        self.number = None

        def note(number: int, _: object) -> None:
            if self.number is not None:
                raise KeyboardInterrupt
            self.number = number

        with handled(("SIGINT", *ENDING), note):
            yield
