"""Several processes whose devices compute one model together."""

from __future__ import annotations

from collections.abc import Callable

from phicore.backend import ProcessGroup
from phicore.errors import BackendError

JOIN_S = 60
"""A process that does not come within this time is given up."""
END_S = 10
"""The processes wait for each other at the end for this time."""


def join(group: ProcessGroup) -> Callable[[], None]:
    """Join this process with the others, and return a function that leaves them.

    From then on, `jax.devices()` has the devices of all of them. JAX must not have looked for
    devices before.

    Raises:
        BackendError: If the others do not come, or JAX has devices already.
    """
    import jax

    try:
        jax.distributed.initialize(
            group.address,
            group.count,
            group.number,
            initialization_timeout=JOIN_S,
            shutdown_timeout_seconds=END_S,
            coordinator_bind_address=group.address if group.number == 0 else None,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"the processes cannot be joined: {reason}") from error
    return jax.distributed.shutdown
