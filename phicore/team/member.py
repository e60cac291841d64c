"""What all processes of a team have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from phicore.backend import ProcessGroup
from phicore.engine.team import Team


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
        self._leave: Callable[[], None] = lambda: None

    def join(self, backend: CanJoin) -> None:
        """Let the tensor library join the processes, before it looks for devices.

        Raises:
            BackendError: If it cannot.
        """
        self._leave = backend.join(self.group)

    def close(self) -> None:
        self._leave()
