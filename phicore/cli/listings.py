"""The commands `phicore plugins`, `phicore backends` and `phicore models`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from phicore.cli.options import JsonOption
from phicore.errors import PhicoreError


def as_command(name: str, function: Callable[..., None]) -> Any:
    """Turn a plugin's function into a typer command."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)  # its result is dropped, since it is not an exit code

    single = typer.Typer(rich_markup_mode=None, add_completion=False)
    single.command(name)(run)
    return typer.main.get_command(single)


def plugins(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the installed plugins."""
    from phicore.cli.terminal import table
    from phicore.plugins import Plugins

    found = Plugins()
    own = list(context.find_root().command.commands)  # type: ignore[attr-defined]
    cells: list[tuple[str, str, str | None, str]] = [
        (p.name, p.distribution, p.version, "; ".join(p.provides) or "provides nothing")
        for p in found.installed(as_command, taken=own)
    ]
    cells += [(p.name, p.distribution, None, f"not usable: {p.reason}") for p in found.broken]
    cells += [(name, owner, None, "switched off") for name, owner in found.disabled]
    columns = ["name", "distribution", "version", "status"]
    if as_json:
        rows = [dict(zip(columns, row, strict=True)) for row in cells]
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    table(columns, [[cell or "-" for cell in row] for row in cells])


def backends(as_json: JsonOption = False) -> None:
    """List the installed backends and whether they work here."""
    from phicore.cli.terminal import table
    from phicore.plugins import NONE_INSTALLED, Plugins

    plugins = Plugins()
    rows: list[dict[str, Any]] = []
    for info in plugins.backends().values():
        try:
            devices, notes = info.devices(), info.notes()
            status = f"usable; {notes}" if notes else "usable"
        except PhicoreError as error:
            devices, status = [], str(error)
        rows.append(
            {
                "name": info.name,
                "distribution": info.distribution,
                "version": info.version,
                "devices": devices,
                "status": status,
            }
        )
    for plugin in plugins.broken:
        rows.append(
            {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": None,
                "devices": [],
                "status": f"broken: {plugin.reason}",
            }
        )
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    if not rows:
        print(NONE_INSTALLED)
        return
    table(
        ["backend", "distribution", "devices", "status"],
        [
            [
                r["name"],
                f"{r['distribution']} {r['version'] or ''}",
                ", ".join(r["devices"]),
                r["status"],
            ]
            for r in rows
        ],
    )


def models(as_json: JsonOption = False) -> None:
    """List the models with a short name and those in the Hub cache."""
    from phicore.cli.terminal import Console, size, table
    from phicore.sources import default_reference, known_models

    known = known_models()
    default, why = default_reference()
    if as_json:
        rows = [
            {
                "name": m.name,
                "reference": m.reference,
                "path": str(m.path) if m.path else None,
                "size_bytes": m.size_bytes,
                "is_default": m.name == default,
            }
            for m in known
        ]
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    table(
        ["model", "on this machine", "reference"],
        [[m.name, size(m.size_bytes) if m.size_bytes else "no", m.reference] for m in known],
    )
    Console().say(f"without --model: {default} ({why})")
