"""Observers: plugins that watch generations, for example to trace, count or display them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from phicore.errors import FAULTS

if TYPE_CHECKING:
    from pluggy import HookImpl

    from phicore.plugins.hookspecs import RunningGeneration
    from phicore.text.pieces import Piece

log = logging.getLogger(__name__)


class Observers:
    """Calls the hooks of observers. If one raises, the error is logged and it is not called again.

    Args:
        hooks: The implementations of each hook, by the hook's name.
    """

    def __init__(self, hooks: dict[str, Sequence[HookImpl]]) -> None:
        self._hooks = hooks
        self._failed: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Return the plugins' names in pluggy, such as `phicore-jax:jax`."""
        return sorted({hook.plugin_name for hooks in self._hooks.values() for hook in hooks})

    def watch(self, generation: RunningGeneration, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Pass pieces on, and call the observers for each."""
        self._call("phicore_generation_started", generation=generation)
        error: BaseException | None = None
        try:
            for piece in pieces:
                self._call("phicore_piece_generated", generation=generation, piece=piece)
                yield piece
        except GeneratorExit:  # closed early, which is no error
            raise
        except BaseException as caught:
            error = caught
            raise
        finally:
            pieces.close()  # type: ignore[attr-defined]  # a generator
            self._call("phicore_generation_ended", generation=generation, error=error)

    def _call(self, name: str, **arguments: Any) -> None:
        for hook in self._hooks[name]:
            if hook.plugin_name in self._failed:
                continue
            try:
                hook.function(*(arguments[argument] for argument in hook.argnames))
            except FAULTS:
                self._failed.add(hook.plugin_name)
                log.exception("%s: %s failed; it is not called again", hook.plugin_name, name)
