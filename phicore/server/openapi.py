"""The OpenAPI description of the server."""

from __future__ import annotations

from typing import Any

from phicore.server.settings import Settings


def description(settings: Settings) -> dict[str, Any]:
    """Return the description."""
    return {"openapi": "3.1.0", "info": {"title": "phicore", "version": "1"}, "paths": {}}
