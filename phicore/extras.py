"""Libraries that are installed with an extra, such as `phicore[grammar]`."""

from __future__ import annotations

import importlib
from types import ModuleType

from phicore.errors import PhicoreError

LIBRARIES = {
    "grammar": ("llguidance",),
    "serve": ("starlette", "uvicorn", "h11", "prometheus_client"),
    "testing": ("pytest", "hypothesis"),
}
"""The modules of each extra that phicore itself imports."""


def missing(name: str, purpose: str) -> str:
    """Return the message that a library is not installed, with the command that installs it.

    Args:
        name: The name of a module of `LIBRARIES`.
        purpose: What needs the library.
    """
    [extra] = (extra for extra, names in LIBRARIES.items() if name in names)
    return f"{name} is missing for {purpose}; install it with: pip install 'phicore[{extra}]'"


def library(name: str, purpose: str) -> ModuleType:
    """Import a library of an extra.

    Args:
        name, purpose: The arguments of `missing`.
    Raises:
        PhicoreError: If the library is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise PhicoreError(missing(name, purpose)) from error


def check(extra: str, purpose: str) -> None:
    """Check that all libraries of an extra are installed.

    Raises:
        PhicoreError: If one is not.
    """
    for name in LIBRARIES[extra]:
        library(name, purpose)
