"""Several processes whose devices compute one model together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from phicore.backend import ProcessGroup
from phicore.errors import BackendError

JOIN_S = 60
"""A process that does not come within this time is given up."""
END_S = 60
"""The processes wait for each other at the end for this time: one may still compile."""


def join(group: ProcessGroup) -> Callable[[], None]:
    """Join this process with the others, and return a function that leaves them.

    From then on, `jax.devices()` has the devices of all of them. JAX must not have looked for
    devices before.

    Raises:
        BackendError: If the others do not come, or JAX has devices already.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
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


def meet(mesh: Any) -> None:
    """Let the devices of a mesh exchange something for the first time.

    On CPUs, the library that connects them then tells about it on standard output, where a result
    is to be. So it is told on standard error instead.
    """
    import jax
    from jax import numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    sharding = NamedSharding(mesh, P(*mesh.axis_names))
    ones = jax.make_array_from_callback((mesh.size,), sharding, lambda _: jnp.ones(1))
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))
    with _output_to_errors():
        total(ones).block_until_ready()


@contextmanager
def _output_to_errors() -> Iterator[None]:
    """Let what libraries write on standard output go to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
