"""Warnings of replicas that load a model, for the command: Ray keeps their logs in files.

Each is a key in the store of the cluster, so that one which several replicas have is told once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list, _internal_kv_put

SPACE = "phicore"
LONGEST = 500


class _Teller(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())[:LONGEST]
        with suppress(Exception):  # the replica's log has it, too
            _internal_kv_put(line, b"", namespace=SPACE)


@contextmanager
def telling() -> Iterator[None]:
    """Tell the command the warnings of this process."""
    teller, logger = _Teller(logging.WARNING), logging.getLogger("phicore")
    logger.addHandler(teller)
    try:
        yield
    finally:
        logger.removeHandler(teller)


class Told:
    """What replicas tell from now on."""

    def __init__(self) -> None:
        _internal_kv_del("", del_by_prefix=True, namespace=SPACE)  # of an earlier command
        self._seen: set[str] = set()

    def new(self) -> list[str]:
        """Return what was told since the last call."""
        told = {key.decode(errors="replace") for key in _internal_kv_list("", namespace=SPACE)}
        found = sorted(told - self._seen)
        self._seen |= told
        return found
