"""Hostile tests: how many tries they make, and what the worst try took.

    PHICORE_TRIES=10000 pytest tests/hostile -n 0 -s

makes so many tries of each kind; by default there are few. At the end, this prints how many tries
of each kind there were, and the longest time and the largest growth of memory of one try.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, settings

TRIES = int(os.environ.get("PHICORE_TRIES", "0"))
MOST_GROWTH = 1 << 30
"""No try may need so many more bytes of memory than the process had before."""
HANG_S = 300
"""A try that takes so many seconds hangs, on the slowest machine. It ends the process."""


def tries(by_default: int = 25) -> settings:
    """Return the settings of a test of hypothesis."""
    return settings(
        max_examples=TRIES or by_default,
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )


@dataclass
class Worst:
    """The number of tries of a kind, and the worst of them."""

    count: int = 0
    seconds: float = 0.0
    growth: int = 0


_WORST: dict[str, Worst] = defaultdict(Worst)


def _peak() -> int:
    """Return the most memory that this process ever had, in bytes; 0 where nobody tells."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    [line] = [each for each in status.read_text().splitlines() if each.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


@contextmanager
def watched(kind: str) -> Iterator[None]:
    """Watch a try. One that hangs, even in a library's code, ends the process with a traceback.

    Raises:
        AssertionError: If it needs more memory than `MOST_GROWTH`.
    """
    before, started = _peak(), time.perf_counter()
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        worst, growth = _WORST[kind], _peak() - before
        worst.count += 1
        worst.seconds = max(worst.seconds, time.perf_counter() - started)
        worst.growth = max(worst.growth, growth)
        assert growth < MOST_GROWTH


@atexit.register  # not a fixture, since pytest and the tests import this module separately
def _tell() -> None:
    for kind, worst in _WORST.items() if TRIES else ():
        size = f"{worst.growth / 2**20:.0f} MiB"
        print(f"{kind}: {worst.count} tries, worst {worst.seconds:.2f} s, {size}")
