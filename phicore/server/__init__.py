"""The web server: OpenAI's API over a model, as an ASGI application.

    import phicore
    from phicore.server import app

    application = app(phicore.load("smollm2"))  # run it with uvicorn, or mount it

`phicore serve` is this application with a socket. One thread computes (`worker.py`); the handlers
of requests are coroutines, and get what the thread computes a step at a time.

Importing this package imports neither starlette nor a tensor library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phicore.server.application import app
    from phicore.server.settings import Settings

__all__ = ["Settings", "app"]


def __getattr__(name: str) -> Any:
    if name == "app":
        from phicore.server.application import app

        return app
    if name == "Settings":
        from phicore.server.settings import Settings

        return Settings
    raise AttributeError(f"module 'phicore.server' has no attribute {name!r}")
