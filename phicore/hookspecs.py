"""The hooks a plugin can implement, through the entry-point group `phicore`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    from phicore.protocol import Backend
    from phicore.sources import ModelFiles

hookspec = pluggy.HookspecMarker("phicore")
hookimpl = pluggy.HookimplMarker("phicore")


class RegisterBackend(Protocol):
    """Tells phicore of a backend."""

    def __call__(
        self,
        name: str,
        *,
        create: Callable[[str | None], Backend],
        devices: Callable[[], list[str]],
        protocol: int,
        notes: Callable[[], str] | None = None,
    ) -> None:
        """
        Args:
            name: What `--backend` takes.
            create: Makes the backend on a device, or on the best one for None. The tensor library
                is imported in here, not before; what it raises is shown as the reason why the
                backend cannot be used.
            devices: The names that `create` takes on this machine.
            protocol: The version of the tensor protocol that the backend was written for, as a
                number: `phicore.protocol.VERSION` then. It is not used with another.
            notes: What `phicore backends` says beside "usable", such as which kernels are in use.
        """


class RegisterSource(Protocol):
    """Tells phicore of a kind of model reference."""

    def __call__(self, scheme: str, *, resolve: Callable[[str], ModelFiles]) -> None:
        """
        Args:
            scheme: What stands before the colon of a reference, such as `hf`.
            resolve: Takes the whole reference and gives the files, fetched if need be.
        """


@hookspec
def phicore_register_backends(register: RegisterBackend) -> None:
    """Called when backends are looked for; call `register` for each that the plugin has.

    Import no tensor library here: listing backends must be quick.
    """


@hookspec
def phicore_register_sources(register: RegisterSource) -> None:
    """Called when a model reference is resolved; call `register` for each scheme."""
