"""Libraries that are installed with an extra, such as `phicore[grammar]`."""

from __future__ import annotations

import importlib
from types import ModuleType

from phicore.errors import PhicoreError


def library(name: str, extra: str, purpose: str) -> ModuleType:
    """Import a library of an extra.

    Args:
        name: The name of the module.
        extra: The name of the extra.
        purpose: What needs the library, for the message.
    Raises:
        PhicoreError: If the library is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise PhicoreError(f"{purpose}: needs {name}; install phicore[{extra}]") from error
