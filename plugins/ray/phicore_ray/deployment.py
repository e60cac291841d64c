"""The application of Ray Serve."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from phicore.cli.serve import name_of
from phicore.engine.scheduler import MAX_SEQUENCES
from phicore.errors import ArgumentError
from phicore.server.plan import Plan
from phicore.server.settings import Settings
from phicore_ray.replica import DEPLOYMENT, ThreadedPlan
from phicore_ray.scaling import Scaling

QUICK = 8
"""This number of requests that compute nothing, such as those for /health, fit beside answers."""
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 30.0
LEEWAY_S = 2.0
"""A replica ends this long after the grace time, in seconds."""


def app(
    model: str | os.PathLike[str] | None = None,
    *,
    replicas: str | int = "1",
    num_gpus: float = 0.0,
    num_cpus: float | None = None,
    target: float | None = None,
    up_after: float = 10.0,
    down_after: float = 300.0,
    sticky: bool = True,
    names: Sequence[str] | None = None,
    settings: Settings | Mapping[str, Any] | None = None,
    api_keys: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    **loading: Any,
) -> Application:
    """Return the application of Ray Serve that serves a model.

    Each replica is an actor that runs the application of `phicore serve` with a model of its own.

    Args:
        model: The reference of the model, which every node of the cluster must be able to resolve.
            None takes the default model.
        replicas: The number of replicas, or the least and the largest number as "2..8".
        num_gpus: The number of GPUs for each replica.
        num_cpus: The number of CPUs for each replica; it computes with as many threads. None
            takes an equal share of this machine's CPUs.
        target: The number of answers under way for each replica that scaling aims at. None takes
            the number that a replica computes together.
        up_after: The time in seconds with too few replicas after which one is started.
        down_after: The time in seconds with too many replicas after which one is ended.
        sticky: Whether the requests of a conversation go to the replica that has read its
            beginning; see `phicore_ray.router`.
        names: The names by which clients may call the model. None takes the reference.
        settings: Limits and behaviour of each replica; `grace` is the time for answers that are
            under way when a replica ends.
        api_keys: If there are any, clients must send one of these keys.
        allowed_hosts: Names of the server beside localhost and addresses; "*" allows all.
        cors_origins: Origins whose pages may use the server.
        loading: Further arguments of `phicore.load`.
    Raises:
        ArgumentError: If an argument is wrong.
    """
    from phicore.sources import default_reference

    reference = default_reference()[0] if model is None else os.fspath(model)
    plan = Plan(
        reference,
        loading=loading,
        names=(name_of(reference),) if names is None else tuple(names),
        settings=settings if isinstance(settings, Settings) else Settings(**(settings or {})),
        api_keys=tuple(api_keys),
        allowed_hosts=tuple(allowed_hosts),
        cors_origins=tuple(cors_origins),
    )
    scaling = Scaling(
        replicas=str(replicas),
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        target=target,
        up_after=up_after,
        down_after=down_after,
        sticky=sticky,
    )
    return planned(plan, scaling)


def build(args: Mapping[str, Any]) -> Application:
    """Return the application for the `args` of a configuration file, which are those of `app`.

    Raises:
        ArgumentError: If an argument is wrong.
    """
    return app(**args)


def planned(plan: Plan, scaling: Scaling) -> Application:
    """Return the application that carries out a plan."""
    slots = plan.loading.get("max_sequences", MAX_SEQUENCES)
    if not isinstance(slots, int) or slots < 1:
        raise ArgumentError(parameter="max_sequences", expected="1 or more", got=slots)
    given = {each.name: getattr(plan, each.name) for each in fields(plan)}
    if plan.loading.get("threads") is None:
        loading = {**plan.loading, "threads": scaling.threads}
        plan = ThreadedPlan(**{**given, "loading": loading})
    least, most = scaling.bounds
    settings = plan.settings
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": scaling.cpus, "num_gpus": scaling.num_gpus},
        # What a replica computes and what waits there; more waits outside, for any replica.
        "max_ongoing_requests": slots + settings.max_queue + QUICK,
        "max_queued_requests": settings.max_queue + QUICK,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": settings.grace + LEEWAY_S,
        # A download may fail, so it is tried again, and a damaged file is told soon.
        "max_constructor_retry_count": 2,
    }
    if least == most:
        options["num_replicas"] = most
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=least,
            initial_replicas=least,
            max_replicas=most,
            target_ongoing_requests=scaling.target or slots,
            upscale_delay_s=scaling.up_after,
            downscale_delay_s=scaling.down_after,
            metrics_interval_s=1.0,
            look_back_period_s=3.0,
        )
    if scaling.sticky:
        options["request_router_config"] = RequestRouterConfig(
            request_router_class="phicore_ray.router.StickyRouter"
        )
    return DEPLOYMENT.options(**options).bind(plan)
