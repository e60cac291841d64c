"""Writes the skeleton of a backend: a distribution that passes the conformance kit unchanged."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from phicore.backend import VERSION
from phicore.errors import ArgumentError, SourceError


def write_backend(name: str, into: Path) -> list[Path]:
    """Write the distribution `phicore-NAME` into a folder, and return its files.

    Raises:
        ArgumentError: If the name is not a lower-case name of a Python module.
        SourceError: If the folder `phicore-NAME` already exists or cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ArgumentError(
            "name: expected lower case letters, digits and underscores, a letter first; "
            f"got {name!r}"
        )
    folder = into / f"phicore-{name}"
    values = {
        "NAME": name,
        "CLASS": "".join(part.capitalize() for part in name.split("_")),
        "VERSION": str(VERSION),
        "RELEASE": f"{'.'.join(version('phicore').split('.')[:2])}.0",  # the API of this release
    }
    written = []
    try:
        folder.mkdir(parents=True)
        for template, place in _templates(files("phicore.lab") / "templates" / "backend"):
            path = folder / place.replace("package", f"phicore_{name}").removesuffix(".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            text = template.read_text(encoding="utf-8")
            for word, value in values.items():
                text = text.replace(word, value)
            path.write_text(text, encoding="utf-8")
            written.append(path)
    except FileExistsError:
        raise SourceError(f"{folder}: exists already; choose another name or folder") from None
    except OSError as error:
        raise SourceError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return written


def _templates(folder: Traversable, place: str = "") -> list[tuple[Traversable, str]]:
    found = []
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            found += _templates(item, f"{place}{item.name}/")
        elif item.name.endswith(".txt"):
            found.append((item, place + item.name))
    return found
