"""Serves on a cluster from the command's process until a signal comes."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from phicore.cli.serve import Serving, listening
from phicore.errors import PhicoreError
from phicore.server.plan import Plan
from phicore_ray.deployment import planned
from phicore_ray.front import LAYERS, VARIABLE
from phicore_ray.replica import MARK
from phicore_ray.scaling import Scaling
from phicore_ray.telling import Told

OBJECT_STORE = 100_000_000
"""The bytes of Ray's store for objects on a cluster of our own. Answers do not go through it."""
NAME = "phicore"
LOOK_S = 0.5


def run(serving: Serving, scaling: Scaling, address: str | None) -> None:
    """Serve until a signal comes.

    Args:
        serving: What to serve, and where.
        scaling: How many replicas there are, and what each of them gets.
        address: The address of a cluster. None starts one, and ends it.
    Raises:
        KeyboardInterrupt: If the signal was Ctrl-C.
        PhicoreError: If the replicas cannot start.
    """
    port = serving.port
    if address is None:
        with listening(serving.host, port) as found:  # else Ray would say it later, and at length
            port = found.getsockname()[1]
        _resolve(serving.plan)
    url = f"http://{f'[{serving.host}]' if ':' in serving.host else serving.host}:{port}"
    with _cluster(address), _signals() as signals:
        _check_resources(scaling)
        try:
            serve.start(http_options={"host": serving.host, "port": port})
            told = Told()
            _say(f"starting {scaling.replicas} of {serving.plan.reference}")
            target = serve.RunTarget(planned(serving.plan, scaling), name=NAME)
            serve.run_many([target], wait_for_applications_running=False)
            _wait_until_running(signals, told)
            if not signals.numbers:
                _say(f"listening at {url}")
                signals.wait()
        finally:
            _end(signals)
    if signal.SIGINT in signals.numbers:
        raise KeyboardInterrupt


def _resolve(plan: Plan) -> None:
    """Check the reference of the model, and download it once if it is on the Hub.

    Raises:
        PhicoreError: If there is no such model.
    """
    from phicore.plugins import Plugins, choose_backend
    from phicore.sources import resolve

    plugins = Plugins()
    if plan.loading["backend"] is not None:
        choose_backend(plan.loading["backend"], plugins)
    schemes = plugins.sources()
    resolve(plan.reference, tokenizer=plan.loading["tokenizer"], schemes=schemes)
    if (draft := plan.loading["draft_model"]) is not None:
        resolve(draft, schemes=schemes)


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine, and end it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(VARIABLE, LAYERS)
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    try:
        if address is None:
            ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
        else:
            ray.init(address, **quiet)
    except Exception as error:  # a node that does not start in time is no special error
        where = "on this machine" if address is None else f"at {address}"
        reason = " ".join(str(error).split())
        raise PhicoreError(f"no cluster of Ray {where}: {reason:.300}") from error
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        ray.shutdown()


class _Signals:
    """The signals that came."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._came = threading.Event()

    def take(self, number: int, frame: Any) -> None:
        self.numbers.append(number)
        self._came.set()

    def wait(self, most_s: float | None = None) -> None:
        """Wait for a signal."""
        self._came.wait(most_s)


@contextmanager
def _signals() -> Iterator[_Signals]:
    found = _Signals()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, found.take) for number in numbers]
    try:
        yield found
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _check_resources(scaling: Scaling) -> None:
    """Check that the least number of replicas has room.

    Raises:
        PhicoreError: If it has none, ever.
    """
    least = scaling.bounds[0]
    there = ray.cluster_resources()
    for name, each, what in (
        ("GPU", scaling.num_gpus, "num_gpus"),
        ("CPU", scaling.cpus, "num_cpus"),
    ):
        if (has := there.get(name, 0.0)) < least * each:
            raise PhicoreError(
                f"{least} replicas need {least * each:g} {name}s; the cluster has {has:g}",
                parameter=what,
            )


def _wait_until_running(signals: _Signals, told: Told) -> None:
    """Wait until the replicas have loaded the model, or a signal comes; show their warnings.

    Raises:
        PhicoreError: If they cannot load it.
    """
    while not signals.numbers:
        found = serve.status().applications.get(NAME)
        for line in told.new():
            _say(line)
        if found is not None:
            if found.status == ApplicationStatus.RUNNING:
                return
            if (reason := reason_of(found)) is not None:
                raise PhicoreError(reason)
            if found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise PhicoreError(f"Ray cannot serve: {' '.join(found.message.split())[-300:]}")
        signals.wait(LOOK_S)


def reason_of(found: ApplicationStatusOverview) -> str | None:
    """Return why a replica of an application could not start; None if none has told a reason."""
    for text in (found.message, *(each.message for each in found.deployments.values())):
        if reasons := re.findall(re.escape(MARK) + r"(.+)", text):
            return str(reasons[-1]).strip()
    return None


def _end(signals: _Signals) -> None:
    """Let the replicas finish what is under way; a second signal ends them at once."""
    count = len(signals.numbers)
    done = threading.Event()

    def delete() -> None:
        try:
            if serve.status().applications:
                serve.delete(NAME)
        finally:
            done.set()

    thread = threading.Thread(target=delete, daemon=True)
    thread.start()
    while not done.wait(LOOK_S) and len(signals.numbers) == count:
        pass


def _say(line: str) -> None:
    sys.stderr.write(f"phicore ray-serve: {line}\n")
    sys.stderr.flush()
