"""What the tests of phicore-ray share: Ray, imported for tests, and what is deployed there."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

# Ray's processes inherit these.
os.environ["PHICORE_PACKED_CACHE"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray uses what its libraries call deprecated
    import ray
    from phicore_ray.front import LAYERS, VARIABLE
    from phicore_ray.replica import HEADER
    from ray import data, serve
    from ray.exceptions import RayActorError
    from ray.serve.context import _get_global_client

os.environ[VARIABLE] = LAYERS

WAIT_S = 300.0
"""A replica of Ray starts within seconds; a machine that others use may need this time."""
__all__ = [
    "ENDLESS",
    "HI",
    "WAIT_S",
    "Cluster",
    "data",
    "descendants",
    "ray",
    "serve",
    "wait_until",
]
HI = [{"role": "user", "content": "Hi"}]
ENDLESS = {
    "max_tokens": 15000,
    "temperature": 0,
    "extra_body": {"repetition_penalty": 1, "ignore_eos": True},
}


def wait_until(condition: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> Any:
    """Wait until a condition holds, and return its value."""
    end = time.monotonic() + wait_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.05)
    return found


def descendants(pid: int) -> set[int]:
    """Return the processes that a process has started, and that these have started."""
    parents = {}
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                stat = (each / "stat").read_text()
            except OSError:
                continue
            parents[int(each.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


class Cluster:
    """Ray Serve on a cluster of two CPUs.

    Attributes:
        url: The beginning of the addresses of what is served.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def deploy(self, application: serve.Application, wait: bool = True) -> None:
        """Serve an application in place of the one before."""
        serve.run_many(
            [serve.RunTarget(application, name="phicore")], wait_for_applications_running=False
        )
        if wait:
            wait_until(lambda: self.status == "RUNNING", "the deployment")

    @property
    def status(self) -> str:
        """Return the status of what is served."""
        return serve.status().applications["phicore"].status.value

    @property
    def replicas(self) -> dict[str, int]:
        """Return the process of each replica that runs, by the replica's name."""
        return {each["replica_id"]: each["pid"] for each in self._running}

    @property
    def _running(self) -> list[dict[str, Any]]:
        details = _get_global_client().get_serve_details()
        found = details["applications"]["phicore"]["deployments"]["phicore"]["replicas"]
        return [each for each in found if each["state"] == "RUNNING"]

    @property
    def is_idle(self) -> bool:
        """Return whether no replica computes a request; a replica that dies may still be listed."""
        try:
            found = [ray.get_actor(each["actor_name"], "serve") for each in self._running]
            return not any(ray.get([each.get_num_ongoing_requests.remote() for each in found]))
        except (ValueError, RayActorError):
            return False

    def client(self, session: str | None = None) -> openai.OpenAI:
        """Return OpenAI's client, with a session or without."""
        headers = {} if session is None else {"x-session-id": session}
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="any",
            max_retries=0,
            timeout=WAIT_S,
            default_headers=headers,
        )

    def ask(self, session: str | None = None, **body: Any) -> tuple[Any, str]:
        """Return an answer, or the stream of one, and the name of the replica."""
        body = {"model": "endless", "messages": HI, **body}
        raw = self.client(session).chat.completions.with_raw_response.create(**body)
        return raw.parse(), raw.headers[HEADER]
