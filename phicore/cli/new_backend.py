"""The command `phicore new-backend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def new_backend(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="The name of the backend, for --backend: lower-case letters, digits and _.",
        ),
    ],
    into: Annotated[
        Path,
        typer.Option("--into", metavar="FOLDER", help="The folder to write into."),
    ] = Path(),
) -> None:
    """Write a backend to start from.

    It is a plugin with its tests, and computes with NumPy until you replace the operations.
    """
    from phicore.cli.terminal import Console
    from phicore.lab.scaffold import write_backend

    for path in write_backend(name, into):
        print(path)
    folder = into / f"phicore-{name}"
    Console().say(f"next: pip install -e {folder}[test]; phicore conformance -b {name}")
