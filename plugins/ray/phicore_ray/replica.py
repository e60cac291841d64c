"""A replica: the application of `phicore serve` with its model, in an actor of Ray."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ray import serve
from ray.exceptions import TaskCancelledError
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phicore.errors import BackendError, PhicoreError
from phicore.model import Model
from phicore.server.plan import Plan
from phicore.server.service import Service
from phicore_ray.metrics import Exporter
from phicore_ray.telling import telling

log = logging.getLogger(__name__)

EXPORT_S = 5.0
"""The time between two exports of the metrics, in seconds."""
HEADER = "x-phicore-replica"
"""The header of answers that names the replica."""
MARK = "phicore cannot serve: "
"""Begins the line with the reason why a replica cannot start. The command looks for it."""

SLOTS = "slots"
"""The name under which a replica tells the router how many answers it computes together."""


class ReplicaError(RuntimeError):
    """A replica cannot start, or can no longer compute. Its line says why."""


class ThreadedPlan(Plan):
    """A plan that computes with a number of threads where the backend lets that be chosen."""

    def load(self) -> Model:
        """Load the model.

        Raises:
            PhicoreError: If it cannot be loaded.
        """
        try:
            return super().load()
        except BackendError as error:
            if error.parameter != "threads":
                raise
        return replace(self, loading={**self.loading, "threads": None}).load()


class Named:
    """Tells clients in a header which replica has answered, and the application when they leave.

    Args:
        app: The application.
        name: The name of the replica.
    """

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers[HEADER] = self._name
                del headers["x-request-id"]  # Ray's proxy adds it
            await send(message)

        async def received() -> Message:
            try:
                return await receive()
            except TaskCancelledError:  # with this, Ray's proxy tells that the client is gone
                return {"type": "http.disconnect"}

        await self._app(scope, received, named)


class Replica:
    """Serves a model. It is ready when the model is loaded.

    Ray asks `check_health`, and replaces a replica that can no longer compute. Ray lets a replica
    finish what is under way before it ends it.
    """

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc] # Ray awaits it
        """Load the model.

        Raises:
            ReplicaError: If that fails.
        """
        plan.prepare_process()
        self._application = plan.application()
        self._service: Service = self._application.state.service
        with telling():
            self._service.start()
            while self._service.state == "loading":
                await asyncio.sleep(0.02)
        self._check()
        self._exporting = asyncio.create_task(self._export())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application. Ray calls this when the replica is ready."""
        return Named(self._application, serve.get_replica_context().replica_id.unique_id)

    def record_replica_metadata(self) -> dict[str, int]:
        """Return what the router knows of this replica. Ray calls this when it is ready."""
        return {SLOTS: self._service.model.engine.scheduler.max_sequences}

    async def check_health(self) -> None:
        """Check that the model computes.

        Raises:
            ReplicaError: If it does not.
        """
        self._check()

    def _check(self) -> None:
        service = self._service
        if service.state == "failed" or not service.is_alive:
            failure = service.failure
            known = isinstance(failure, PhicoreError)
            reason = str(failure) if known else repr(failure or "the model does not compute")
            raise ReplicaError(f"{MARK}{' '.join(reason.split())}") from None

    async def _export(self) -> None:
        exporter = Exporter(self._service)
        while True:
            exporter.export()
            await asyncio.sleep(EXPORT_S)

    async def __del__(self) -> None:
        exporting: asyncio.Task[Any] | None = getattr(self, "_exporting", None)
        if exporting is not None:
            exporting.cancel()
            with suppress(asyncio.CancelledError):
                await exporting


DEPLOYMENT: serve.Deployment = serve.deployment(name="phicore")(serve.ingress()(Replica))
"""The replicas, as Ray deploys them."""
