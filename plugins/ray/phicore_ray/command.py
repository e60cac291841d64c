"""The command `phicore ray-serve`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from phicore.cli.options import takes, takes_those_of
from phicore.cli.serve import Serving, chosen
from phicore.errors import ArgumentError, PhicoreError
from phicore_ray.scaling import Scaling


@takes_those_of(chosen, "serving")
@takes("scaling", Scaling)
def ray_serve(
    *,
    scaling: dict[str, Any],
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Serve on this cluster of Ray, such as auto or ray://host:10001. [one on this "
            "machine, which the command starts and ends]",
        ),
    ] = None,
    serving: Serving,
) -> None:
    """Serve a model from several replicas, with Ray Serve.

    All options of `phicore serve` apply to each replica. SIGTERM and Ctrl-C let the replicas
    finish what is under way.
    """
    wanted = Scaling(**scaling)
    if serving.plan.loading["processes"] > 1:
        raise ArgumentError("a replica is one process", parameter="processes")
    try:
        import ray  # noqa: F401
        from ray import serve  # noqa: F401
    except ImportError as error:
        raise PhicoreError(
            "the command ray-serve needs Ray Serve; install it with: pip install 'ray[serve]'"
        ) from error
    from phicore_ray.running import run

    run(serving, wanted, address)
