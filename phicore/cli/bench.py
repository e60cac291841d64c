"""`phicore bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from phicore.cli.options import (
    BackendOption,
    CacheTypeOption,
    CompactOption,
    DeviceOption,
    DevicesOption,
    DtypeOption,
    FastPrefillOption,
    JsonOption,
    ModelOption,
    ThreadsOption,
    complete_synthetic,
)
from phicore.errors import ArgumentError

EXAMPLES = """
\b
Examples:
  phicore bench -m phi-3-mini
  phicore bench --synthetic phi-3-mini -p 128,512 -n 64 -d 0,1024 --markdown
  phicore bench -b numpy -p 0 -n 32 -r 3 --json
"""


def bench(
    model: ModelOption = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random weights in the shapes of phi-3-mini, phi-3-medium or tiny, written to the "
            "cache once, instead of a model.",
            autocompletion=complete_synthetic,
        ),
    ] = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    n_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--n-prompt", "-p", metavar="N,...", help="Read this many tokens; 0: do not. [512]"
        ),
    ] = None,
    n_gen: Annotated[
        list[str] | None,
        typer.Option(
            "--n-gen", "-n", metavar="N,...", help="Generate this many tokens; 0: do not. [64]"
        ),
    ] = None,
    depth: Annotated[
        list[str] | None,
        typer.Option(
            "--depth", "-d", metavar="N,...", help="Generate them after this many others. [0]"
        ),
    ] = None,
    repetitions: Annotated[
        int,
        typer.Option(
            "--repetitions", "-r", metavar="N", min=1, help="Runs of each, after one to warm up."
        ),
    ] = 5,
    cache_type: CacheTypeOption = None,
    fast_prefill: FastPrefillOption = False,
    dtype: DtypeOption = None,
    compact: CompactOption = False,
    threads: ThreadsOption = None,
    devices: DevicesOption = 1,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Measure how fast prompts are read and tokens generated."""
    if model is not None and synthetic is not None:
        raise ArgumentError("--synthetic: is a model of its own; leave --model out")
    if as_json and markdown:
        raise ArgumentError("--markdown: not together with --json")
    from phicore.bench import measure, plan, print_markdown, print_table
    from phicore.console import Console
    from phicore.model import load
    from phicore.synthetic import synthetic_model

    rows = plan(n_prompt or ["512"], n_gen or ["64"], depth or ["0"])
    console = Console()
    with console.progress() as progress:

        def show(what: str, done: int, total: int) -> None:
            if what != "prompt":  # one for every run
                progress(what, done, total)

        if synthetic is not None:
            reference = str(synthetic_model(synthetic, progress))
        else:
            reference = model or console.default_model()
        with load(
            reference,
            backend,
            device,
            cache_type=cache_type,
            fast_prefill=fast_prefill,
            dtype=dtype,
            compact=compact,
            threads=threads,
            devices=devices,
            progress=show,
        ) as loaded:
            found = measure(loaded, rows, repetitions, progress)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    elif markdown:
        print_markdown(found)
    else:
        print_table(found)
