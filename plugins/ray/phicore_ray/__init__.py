"""phicore on Ray: the server of `phicore serve` in several replicas, and answers to data sets.

    from ray import serve

    import phicore_ray

    serve.run(phicore_ray.app("smollm2", replicas="2..8"))

Ray is imported when something of it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phicore import hookimpl

if TYPE_CHECKING:
    from phicore_ray.batches import map_batches
    from phicore_ray.deployment import app, build

__all__ = ["app", "build", "map_batches"]


@hookimpl
def phicore_register_commands(register):  # type: ignore[no-untyped-def]
    from phicore_ray.command import ray_serve

    register("ray-serve", ray_serve)


def __getattr__(name: str) -> Any:
    if name in ("app", "build"):
        from phicore_ray import deployment

        return getattr(deployment, name)
    if name == "map_batches":
        from phicore_ray.batches import map_batches

        return map_batches
    raise AttributeError(f"module 'phicore_ray' has no attribute {name!r}")
