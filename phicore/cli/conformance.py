"""The command `phicore conformance`."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from phicore.backend import Backend

from phicore.backend.options import BackendOptions
from phicore.cli.options import BackendOption, JsonOption

EXAMPLES = """
\b
Examples:
  phicore conformance -b numpy
  phicore conformance -b jax -k "attention and not large"
"""


def conformance(
    backend: BackendOption = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The device to test, such as cpu, cuda:1 or metal."),
    ] = None,
    keyword: Annotated[
        str,
        typer.Option(
            "-k",
            metavar="EXPRESSION",
            help="Run only tests and parts that match, as with pytest -k.",
        ),
    ] = "",
    stop_at_first: Annotated[
        bool, typer.Option("--exitfirst", "-x", help="Stop at the first test that fails.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Test a backend.

    The tests cover every operation, every quantization type, whole models, and what the engine
    does with a backend. This needs phicore[testing]. The exit code is 1 if a test fails.
    """
    # NumPy reads this when it is imported. The kit's small products are quicker with one thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from phicore.cli.terminal import Console, table
    from phicore.plugins import Plugins, choose_backend
    from phicore.testing.runner import parts_of, run

    info = choose_backend(backend, Plugins())
    info.create(BackendOptions(device=device))  # raises errors before the tests begin

    def make(options: BackendOptions) -> Backend:
        return info.create(replace(options, device=device))

    console = Console()
    with console.progress() as progress:
        results = run(
            make,
            keyword=keyword,
            stop_at_first=stop_at_first,
            progress=progress,
            failed=lambda result: console.say(f"failed: {result.part}: {result.name}"),
        )
    failed = [result for result in results if result.outcome == "failed"]
    if as_json:
        found = {"backend": info.name, "results": [vars(result) for result in results]}
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        columns = ["part", "passed", "failed", "skipped"]
        table(columns, [[str(row[name]) for name in columns] for row in parts_of(results)])
        for result in failed:
            print(f"\nFAILED {result.part}: {result.name}\n  {result.message}")
    if failed:
        raise typer.Exit(1)
