"""The command `phicore bench`."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phicore.backend.options import BackendOptions
from phicore.cli.options import (
    BackendOption,
    JsonOption,
    ModelOption,
    complete_synthetic,
    model_or_default,
    takes,
)
from phicore.cli.terminal import Console, ProgressLine, duration, size, table
from phicore.errors import ArgumentError

if TYPE_CHECKING:
    from phicore.lab.bench import Moment

EXAMPLES = """
\b
Examples:
  phicore bench -m phi-3-mini
  phicore bench --synthetic phi-3-mini -p 128,512 -n 64 -d 0,1024 --markdown
  phicore bench -b numpy -p 0 -n 32 -r 3 --json
"""


@takes("backend_options", BackendOptions)
def bench(
    *,
    model: ModelOption = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Measure a model of random weights instead: phi-3-mini, phi-3-medium, tiny, or a "
            "part of the first, phi-3-mini-4-layers, phi-3-mini-8-layers or phi-3-mini-16-layers. "
            "The file is written to the cache once.",
            autocompletion=complete_synthetic,
        ),
    ] = None,
    backend: BackendOption = None,
    n_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--n-prompt",
            "-p",
            metavar="N,...",
            help="Lengths of prompts to read, in tokens. 0 skips this test. [512]",
        ),
    ] = None,
    n_gen: Annotated[
        list[str] | None,
        typer.Option(
            "--n-gen",
            "-n",
            metavar="N,...",
            help="Lengths of answers to generate, in tokens. 0 skips this test. [64]",
        ),
    ] = None,
    depth: Annotated[
        list[str] | None,
        typer.Option(
            "--depth",
            "-d",
            metavar="N,...",
            help="Numbers of tokens that fill the context before an answer. [0]",
        ),
    ] = None,
    sequences: Annotated[
        list[str] | None,
        typer.Option(
            "--sequences",
            "-B",
            metavar="N,...",
            help="Numbers of answers that are generated together; their tokens are added. [1]",
        ),
    ] = None,
    repetitions: Annotated[
        int,
        typer.Option(
            "--repetitions",
            "-r",
            metavar="N",
            min=1,
            help="How many times each test runs, after one run to warm up.",
        ),
    ] = 5,
    backend_options: dict[str, Any],
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Measure how fast prompts are read and tokens generated."""
    if model is not None and synthetic is not None:
        raise ArgumentError("it replaces the model; leave --model out", parameter="synthetic")
    if as_json and markdown:
        raise ArgumentError("not together with --json", parameter="markdown")
    from phicore.lab.bench import measure, plan
    from phicore.lab.synthetic import synthetic_model
    from phicore.loading import load

    rows = plan(n_prompt or ["512"], n_gen or ["64"], depth or ["0"], sequences or ["1"])
    console = Console()
    with console.progress() as line:
        shown = _Shown(line)
        if synthetic is not None:
            reference = str(synthetic_model(synthetic, line))
        else:
            reference = model_or_default(model, console.say)
        most = max(row.sequences for row in rows)
        with load(
            reference,
            backend,
            progress=shown.work,
            max_sequences=most,
            prefix_cache_bytes=0,
            **backend_options,
        ) as loaded:
            line("measuring", 0, 1)
            found = measure(loaded, rows, repetitions, shown.measuring)
            line("measuring", 1, 1)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    elif markdown:
        _print_markdown(found)
    else:
        _print_table(found)


class _Shown:
    """Shows the progress of a benchmark."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line
        self._moment: Moment | None = None

    def work(self, what: str, done: int, total: int) -> None:
        """Show the progress of the model: loading, compiling, or reading the prompt of a run."""
        if what != "prompt":
            self._line(what, done, total)
        elif self._moment is not None:
            self.measuring(replace(self._moment, done=done))

    def measuring(self, moment: Moment) -> None:
        """Show the progress of the measurement."""
        self._moment = moment
        run = f"run {moment.run} of {moment.runs}" if moment.run else "warm-up"
        left = "" if moment.left_s is None else f", {duration(moment.left_s)} left"
        self._line.tell(
            f"measuring {moment.name}: {run}, {moment.done} of {moment.tokens} tokens{left}"
        )


COLUMNS = ["test", "tokens/s", "min", "max", "weights, GB/s", "of memory"]


def _print_table(found: dict[str, Any]) -> None:
    """Print the figures as a table, after lines that describe model, backend and machine."""
    for title, text in _head(found):
        print(f"{title:<10} {text}")
    print()
    table(COLUMNS, [_cells(row) for row in found["rows"]])


def _print_markdown(found: dict[str, Any]) -> None:
    """Print the figures as a GitHub Markdown table, after a line that describes the measurement."""
    print("; ".join(f"{title}: {text}" for title, text in _head(found)))
    print()
    for cells in [COLUMNS, ["---"] * len(COLUMNS), *map(_cells, found["rows"])]:
        print(f"| {' | '.join(cells)} |")


def _head(found: dict[str, Any]) -> list[tuple[str, str]]:
    weights = f"{found['weights'] / 1e6:.1f} M weights, {size(found['size_bytes'])}"
    lines = [
        ("model", f"{found['file']}, {weights}"),
        ("backend", f"{found['backend']} ({found['backend_version']}) on {found['device']}"),
        ("machine", f"{found['cpu']}, {found['cpus']} CPUs, Python {found['python']}"),
    ]
    if memory := found["memory_bandwidth"]:
        lines.append(
            (
                "bandwidth",
                f"{memory['median_gb_per_s']:.1f} GB/s (median; best {memory['best_gb_per_s']:.1f})"
                f" read by {memory['threads']} threads",
            )
        )
    peak = found["peak_memory_bytes"]
    cost = f"load {found['load_s']:.2f} s, compile {found['compile_s']:.2f} s"
    lines.append(("cost", cost if peak is None else f"{cost}, peak memory {size(peak)}"))
    count = found["repetitions"]
    runs = "one run" if count == 1 else f"medians of {count} runs"
    return [*lines, ("figures", f"{runs} after one to warm up")]


def _cells(row: dict[str, Any]) -> list[str]:
    gb_per_s, share = row["weights_gb_per_s"], row["share_of_bandwidth"]
    return [
        row["name"],
        f"{row['tokens_per_s']:.2f}",
        f"{row['min_tokens_per_s']:.2f}",
        f"{row['max_tokens_per_s']:.2f}",
        "-" if gb_per_s is None else f"{gb_per_s:.2f}",
        "-" if share is None else f"{share:.0%}",
    ]
