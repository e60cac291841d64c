"""Tells in a line which plugin a program waits for, since it may wait for ever."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from phicore.plugins import blaming

log = logging.getLogger(__name__)

SLOW_S = 10.0
"""A plugin that takes longer is told, once for each call. It may go on: it may download."""
OWN_SLOW_S = 60.0
"""The same for phicore's own backends: to import JAX takes long on a busy machine."""


@contextmanager
def waiting_for(distribution: str, what: str, advice: str = "") -> Iterator[None]:
    """Tell which plugin the calling thread waits for, if the block takes long.

    Args:
        distribution: The plugin's distribution.
        what: What the plugin is to do, such as "create the backend x".
        advice: What the user can do about it.
    """
    thread = threading.get_ident()

    def tell() -> None:
        found = blaming.running(sys._current_frames().get(thread))
        log.warning(
            "still waiting for plugin %s to %s%s%s",
            distribution,
            what,
            f" ({found[1]})" if found else "",
            f"; {advice}" if advice else "",
        )

    is_own = distribution in {"phicore", *blaming.OWN}
    timer = threading.Timer(OWN_SLOW_S if is_own else SLOW_S, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
