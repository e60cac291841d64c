"""What all processes of a team have in common."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from phicore.backend import ProcessGroup
from phicore.engine.team import Team
from phicore.team import ending


class CanJoin(Protocol):
    """A backend whose processes can share their devices (`phicore.plugins.BackendInfo`)."""

    def join(self, group: ProcessGroup) -> Callable[[], None]:
        """Join this process with others; return a function that leaves them."""
        ...


class Member(Team):
    """A process of a team.

    Attributes:
        group: The processes, as the tensor library needs to know them.
    """

    is_alone = False
    group: ProcessGroup

    def __init__(self) -> None:
        self._leave: Callable[[], None] | None = None

    @property
    def has_joined(self) -> bool:
        """Return whether the tensor library has joined the processes."""
        return self._leave is not None

    @contextmanager
    def joined(self, backend: CanJoin) -> Iterator[None]:
        """Let the tensor library join the processes, before it looks for devices.

        If the block fails, the others cannot go on, either.

        Raises:
            BackendError: If it cannot.
        """
        try:
            self._leave = backend.join(self.group)
            atexit.register(self.close)  # the library would wait for the others to leave
            yield
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Let the others end, since this process cannot go on."""
        atexit.register(ending.end_at_exit)

    def close(self) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            atexit.unregister(self.close)
            leave()
