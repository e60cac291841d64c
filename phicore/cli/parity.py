"""The command `phicore parity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from phicore.cli.options import JsonOption, ModelOption, model_or_default

EXAMPLES = """
\b
Examples:
  phicore parity -b jax,mlx,numpy
  phicore parity -m model.gguf -b jax --against reference.npz
  phicore parity -b numpy,jax --trace
"""


def parity(
    model: ModelOption = None,
    backends: Annotated[
        str | None,
        typer.Option(
            "--backends",
            "-b",
            metavar="NAME,...",
            help="Backends to compare; the first is compared with the others. [all that work here]",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz",
            help="Compare with a reference: logits that tools/make_reference.py wrote.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="A text to compute logits of. May be given several times."
        ),
    ] = None,
    n_gen: Annotated[
        int,
        typer.Option(
            "--n-gen", "-n", metavar="N", min=0, help="How many tokens of greedy text to compare."
        ),
    ] = 32,
    max_error: Annotated[
        float,
        typer.Option(
            metavar="X", help="The largest relative error of the logits that is accepted."
        ),
    ] = 1e-4,
    trace: Annotated[
        bool, typer.Option("--trace", help="Find the first operation whose result differs.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare backends with each other, or with a reference, on the same prompts.

    The exit code is 1 if one is further off than --max-error.
    """
    from phicore.cli.terminal import Console, table
    from phicore.lab.parity import PROMPTS
    from phicore.lab.parity import parity as run
    from phicore.plugins import usable_backends

    names = backends.split(",") if backends else usable_backends()
    console = Console()
    reference = model_or_default(model, console.say)
    with console.progress() as progress:
        found = run(
            reference,
            [name.strip() for name in names],
            against=against,
            prompts=prompt or PROMPTS,
            n_gen=n_gen,
            max_error=max_error,
            is_traced=trace,
            progress=progress,
        )
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        table(*_parity_table(found))
        for part in found.get("parts", []):
            where = part["operation"]
            if where is None:
                print(f"{part['name']}: no operation differs")
            else:
                print(f"{part['name']}: differs from {where} on, by {part['errors'][where]:.1e}")
    if not all(row["is_within"] for row in found["comparisons"]):
        raise typer.Exit(1)


def _parity_table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for row in found["comparisons"]:
        divergent = row["first_divergent"]
        rows.append(
            [
                f"{row['name']} against {row['reference']}",
                f"{row['relative_error']:.1e}" + ("" if row["is_within"] else " (too far)"),
                f"{row['kl_divergence']:.1e}",
                f"{row['top1_agreement']:.1%} of {row['positions']}",
                "none" if divergent is None else f"token {divergent[0]} of text {divergent[1] + 1}",
            ]
        )
    columns = ["backend", "relative error", "KL, nats", "same best token", "first divergence"]
    return columns, rows
