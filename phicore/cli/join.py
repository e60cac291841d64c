"""The command `phicore join`."""

from __future__ import annotations

from typing import Annotated

import typer

from phicore.cli.options import ModelOption, TokenizerOption

EXAMPLES = """
\b
Examples, for two hosts with a GPU each:
  export PHICORE_TEAM_KEY=...      # the same secret on both
  phicore serve -m phi-3-mini --devices 2 --processes 2 --coordinator 10.0.0.1:7000
  phicore join 10.0.0.1:7000 -m phi-3-mini
"""


def join(
    coordinator: Annotated[
        str,
        typer.Argument(
            metavar="HOST:PORT",
            help="The address at which the process that leads waits.",
            show_default=False,
        ),
    ],
    *,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    wait: Annotated[
        float,
        typer.Option(
            metavar="S", min=0, help="How long to wait for the process that leads, in seconds."
        ),
    ] = 600.0,
) -> None:
    """Compute a model together with a process on this or another host.

    That process is `phicore serve` or `phicore generate` with --processes; this one follows it and
    ends with it. Both need the same file. All options come from the process that leads; without
    --model, the model does, too.
    """
    from phicore.cli.terminal import Console
    from phicore.loading import join

    with Console().progress() as progress:
        join(coordinator, model, tokenizer=tokenizer, progress=progress, wait_s=wait)
