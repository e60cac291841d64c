"""The command `phicore doctor`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from phicore.cli.options import JsonOption, complete_backend

EXAMPLES = """
\b
Examples:
  phicore doctor
  phicore doctor -b jax --json > report.json
"""


def doctor(
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            "-b",
            metavar="NAME",
            help="Test only this backend. May be given several times. [all that are installed]",
            autocompletion=complete_backend,
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            metavar="S", min=1, max=86400, help="How long each test may take, in seconds."
        ),
    ] = 180.0,
    as_json: JsonOption = False,
) -> None:
    """Test this installation, and print what a bug report needs.

    Each backend computes a tiny random model in a process of its own, and its logits and greedy
    text are compared with NumPy's. The page holds no names of people, machines or files, and no
    keys. The exit code is 1 if a test fails.
    """
    from phicore.chat.store import data_path
    from phicore.cli.terminal import Console
    from phicore.lab.doctor import examine

    with Console().progress() as progress:
        report = examine(
            backend,
            folders={"conversations": data_path()},
            timeout_s=timeout,
            progress=lambda what, done, total: (
                progress.stop() if done == total else progress.tell(f"{what} ...")
            ),
        )
    if as_json:
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        _print(report)
    if not report["is_well"]:
        raise typer.Exit(1)


def _print(report: dict[str, Any]) -> None:
    """Print the report as text."""
    _print_system(report)
    _print_installed(report)
    _print_settings(report)
    _print_tests(report)
    print("all is well" if report["is_well"] else "not all is well")


def _print_system(report: dict[str, Any]) -> None:
    from phicore.cli.terminal import printable, size

    system = report["system"]
    memory, free = system["memory_bytes"], system["free_memory_bytes"]
    facts = {
        "phicore": report["phicore"],
        "Python": system["python"],
        "platform": system["platform"],
        "processor": f"{system['processor']}, {system['cpus']} CPUs for this process",
        "memory": "unknown" if memory is None else size(memory),
        "libraries": _versions(report["libraries"]),
    }
    if free is not None:
        facts["memory"] += f", {size(free)} free"
    for name, text in facts.items():
        print(f"{name:<11}{printable(text)}")


def _print_installed(report: dict[str, Any]) -> None:
    from phicore.cli.terminal import table

    _title("plugins")
    rows = [(p["name"], p["distribution"], p["version"], p["status"]) for p in report["plugins"]]
    table(["name", "distribution", "version", "status"], _cells(rows))
    if report["backends"]:
        _title("backends")
        found = [
            (b["name"], ", ".join(b.get("devices", [])), _versions(b["libraries"]), b.get("notes"))
            for b in report["backends"]
        ]
        table(["backend", "devices", "libraries", "notes"], _cells(found))
    _title("extras")
    for extra in report["extras"]:
        missing = ", ".join(extra["missing"])
        print(f"{extra['name']:<11}{f'missing: {missing}' if missing else 'installed'}")


def _print_settings(report: dict[str, Any]) -> None:
    from phicore.cli.terminal import printable, size, table

    _title("folders")
    folders = [
        (f["kind"], f["path"], str(f["files"]), size(f["size_bytes"]), _writable(f))
        for f in report["folders"]
    ]
    table(["kind", "folder", "files", "size", "writable"], _cells(folders))
    _title("environment")
    for name, value in report["variables"].items():
        print(f"{name} is set" if value is None else f"{name}={printable(value)}")
    if not report["variables"]:
        print("no variable is set")


def _print_tests(report: dict[str, Any]) -> None:
    from phicore.cli.terminal import printable, table
    from phicore.plugins import NONE_INSTALLED

    _title("self-test")
    if report["tests"]:
        columns = ["backend", "device", "result", "relative error", "load", "text", "in all"]
        table(columns, _cells([_test(test) for test in report["tests"]]))
    else:
        print(NONE_INSTALLED)
    for test in report["tests"]:
        if test["reason"] is not None:
            on = f" on {test['device']}" if test["device"] else ""
            print(f"FAILED {test['backend']}{on}: {printable(test['reason'])}")
    for plugin in report["plugins"]:
        if plugin["is_broken"]:
            print(f"BROKEN {plugin['distribution']}: {printable(plugin['status'])}")


def _writable(folder: dict[str, Any]) -> str:
    if folder["is_shared"]:
        return "by EVERYBODY, who can so run code as you; chmod o-w"
    return "yes" if folder["is_writable"] else "no"


def _title(title: str) -> None:
    print(f"\n{title}")


def _test(test: dict[str, Any]) -> tuple[str | None, ...]:
    error = test["relative_error"]
    return (
        test["backend"],
        test["device"],
        test["outcome"],
        None if error is None else f"{error:.1e}",
        *(None if s is None else f"{s:.2f} s" for s in (test["load_s"], test["text_s"])),
        f"{test['seconds']:.1f} s",
    )


def _cells(rows: Iterable[Sequence[str | None]]) -> list[list[str]]:
    from phicore.cli.terminal import printable

    return [[printable(cell) if cell else "-" for cell in row] for row in rows]


def _versions(libraries: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {found or 'MISSING'}" for name, found in libraries.items())
