"""Which plugin's code raised an error, or runs now: for messages that name it.

What counts is the file of a function, so this also knows threads that a plugin has started.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType, ModuleType

GROUP = "phicore"
LONGEST = 300
OWN = {"phicore-jax", "phicore-mlx", "phicore-numpy"}
"""The distributions that are still loaded when plugins are switched off."""


def home(plugin: object) -> Path | None:
    """Return the file of a plugin's module, or the folder of its package."""
    name = getattr(plugin, "__name__" if isinstance(plugin, ModuleType) else "__module__", "")
    file = getattr(sys.modules.get(str(name).partition(".")[0]), "__file__", None)
    if file is None:
        return None
    path = Path(file)
    return path.parent if path.stem == "__init__" else path


def reason(error: BaseException) -> str:
    """Return the type and the first line of an error, at most `LONGEST` characters of it."""
    try:
        text = str(error).encode("utf-8", "backslashreplace").decode()
    except Exception:  # noqa: BLE001 - a plugin's class may fail at that, too
        text = ""
    lines = text.strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:LONGEST]}" if lines else type(error).__name__


def fault(error: BaseException) -> str | None:
    """Return a line that names the installed plugin whose code raised an error.

    Return None if no plugin other than phicore's own was involved.
    """
    found = _innermost(
        (frame.filename, frame.lineno or 0)
        for frame in reversed(traceback.extract_tb(error.__traceback__))
    )
    return found and f"{found[0]} failed: {reason(error)} ({found[1]})"


def running(frame: FrameType | None, but: Path | None = None) -> tuple[str, str] | None:
    """Return the plugin whose code a thread runs, and the place, such as `x.py, line 3`.

    Args:
        but: The folder of a plugin that is meant to take long.
    """
    places = []
    while frame is not None:
        places.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    if but is not None:
        places = [place for place in places if not Path(place[0]).is_relative_to(but)]
    return _innermost(places)


def _innermost(places: Iterable[tuple[str, int]]) -> tuple[str, str] | None:
    """Return the distribution of the first place that is a plugin's, and the place."""
    homes = _homes()
    for file, line in places:
        for folder, distribution in homes:
            if Path(file).is_relative_to(folder):
                return distribution, f"{Path(file).name}, line {line}"
    return None


def _homes() -> list[tuple[Path, str]]:
    """Return where the loaded modules of installed plugins lie, and their distributions."""
    found = []
    for point in entry_points(group=GROUP):
        distribution = point.dist.name if point.dist else "?"
        module = sys.modules.get(point.module)
        if module is not None and distribution not in {"phicore", *OWN}:
            folder = home(module)
            found += [] if folder is None else [(folder, distribution)]
    return found
