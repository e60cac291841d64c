"""The application: routes, layers and life."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from phicore.model import Model
from phicore.server import tokens
from phicore.server.chat import chat
from phicore.server.completions import completions
from phicore.server.errors import ApiError, loading, stopping
from phicore.server.guards import Hosts, Keys, refusal
from phicore.server.logs import Requests
from phicore.server.openapi import description
from phicore.server.page import Page
from phicore.server.service import Service, unknown_model
from phicore.server.settings import Settings

Endpoint = Callable[[Service, Request], Awaitable[Response]]


def app(
    model: Model | Callable[[], Model],
    *,
    names: Sequence[str] | None = None,
    settings: Settings | None = None,
    api_keys: Sequence[str] = (),
    allowed_hosts: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    failed: Callable[[BaseException], None] = lambda error: None,
) -> Starlette:
    """Return the application that serves a model.

    It may be run by any server for ASGI, or mounted in another application. `app.state.service`
    is what its handlers share.

    Args:
        model: The model, or a function that loads it. The function is called in the thread that
            computes, when the application starts; until it returns, /health tells 503.
        names: The names by which clients may call the model. The first is its id. None takes the
            reference of the model, which must then be loaded.
        settings: Limits and behaviour.
        api_keys: If there are any, clients must send one of these keys.
        allowed_hosts: Names of this server beside localhost and addresses; "*" allows all.
        cors_origins: Origins such as "https://example.org" whose pages may use the server.
        failed: Called in the thread that computes if the model cannot be loaded, or can no longer
            compute.
    """
    if names is None:
        names = [model.reference if isinstance(model, Model) else "default"]
    service = Service(model, names, settings or Settings(), failed)
    service.has_keys = bool(api_keys)

    @asynccontextmanager
    async def life(_: Starlette) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        except asyncio.CancelledError:  # the server ends at once, and would tell a traceback
            return
        service.close()

    made = Starlette(
        routes=_routes(service),
        middleware=[
            Middleware(Requests, responses=service.metrics.responses),
            Middleware(Hosts, hosts=allowed_hosts, origins=cors_origins),
            *_cors(cors_origins),
            Middleware(Keys, keys=api_keys),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error},
        lifespan=life,
    )
    made.router.default = Page()  # not a mount, which would hide that a path takes other methods
    made.state.service = service
    return made


def _cors(origins: Sequence[str]) -> list[Middleware]:
    if not origins:
        return []
    found = Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["x-request-id"],
    )
    return [found]


def _routes(service: Service) -> list[Route]:
    def route(path: str, endpoint: Endpoint, method: str, *, versions: bool = True) -> list[Route]:
        handler: Any = partial(endpoint, service)
        paths = [f"/v1{path}", path] if versions else [path]
        return [Route(path, handler, methods=[method]) for path in paths]

    return [
        *route("/chat/completions", chat, "POST"),
        *route("/completions", completions, "POST"),
        *route("/models", models, "GET"),
        *route("/models/{id:path}", one_model, "GET"),
        *route("/tokenize", tokens.tokenize, "POST", versions=False),
        *route("/detokenize", tokens.detokenize, "POST", versions=False),
        *route("/apply-template", tokens.apply_template, "POST", versions=False),
        *route("/health", health, "GET", versions=False),
        *route("/metrics", metrics, "GET", versions=False),
        *route("/openapi.json", openapi, "GET", versions=False),
    ]


async def models(service: Service, request: Request) -> Response:
    """List the names of the model."""
    data = [_model(service, name) for name in service.names]
    return JSONResponse({"object": "list", "data": data})


async def one_model(service: Service, request: Request) -> Response:
    """Describe the model by one of its names."""
    name = request.path_params["id"]
    if name not in service.names:
        raise unknown_model(name, service.names)
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    found = {"id": name, "object": "model", "created": service.created, "owned_by": "phicore"}
    if service.state == "ready":
        model = service.model
        found["max_model_len"] = model.context
        found["meta"] = {
            "vocab_size": model.vocab_size,
            "backend": model.backend,
            "device": model.device,
            "sampling": vars(model.sampling),
        }
    return found


async def health(service: Service, request: Request) -> Response:
    """Tell whether the server can answer."""
    service.start()
    if service.state == "loading":
        raise loading()
    if service.state == "stopping":
        raise stopping()
    if service.state == "failed" or not service.is_alive:
        raise ApiError("the model does not compute any more", status=500, code="server_error")
    service.check_not_blocked()
    return JSONResponse({"status": "ok"})


async def metrics(service: Service, request: Request) -> Response:
    """Return the metrics in Prometheus' format."""
    kind = "text/plain; version=0.0.4; charset=utf-8"
    return Response(service.metrics.text(service.worker_or_none), media_type=kind)


async def openapi(service: Service, request: Request) -> Response:
    """Return the description of the API."""
    names = None if service.settings.any_model else service.names
    return JSONResponse(description(names, has_keys=service.has_keys))


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refusal(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    words = {
        404: f"there is nothing at {path:.100}",
        405: f"{path:.100} does not take {method:.20}",
    }
    message = words.get(error.status_code, error.detail)
    found = refusal(ApiError(message, status=error.status_code, code="unknown_url"))
    found.headers.update(error.headers or {})
    return found
