"""The commands of `phicore`: their arguments, and what goes to standard output.

Standard output carries what was asked for and nothing else; the rest goes to standard error (see
`console.py`). Modules that are slow to import are imported by the command that needs them.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phicore.errors import ArgumentError, PhicoreError
from phicore.streams import read_text, swallowed_interrupts

if TYPE_CHECKING:
    from phicore.model import Generation, Model, Piece


class WithPlugins(typer.core.TyperGroup):
    """phicore's commands, and those of plugins after them."""

    def list_commands(self, ctx: Any) -> list[str]:
        from phicore.plugins import Plugins

        return [*super().list_commands(ctx), *sorted(Plugins().commands())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        from phicore.plugins import Plugins

        function = Plugins().commands().get(cmd_name)
        if function is None:
            return None
        single = typer.Typer(rich_markup_mode=None)
        single.command(cmd_name)(function)
        return typer.main.get_command(single)


app = typer.Typer(
    name="phicore",
    cls=WithPlugins,
    rich_markup_mode=None,  # plain help: it fits 80 columns, and needs no import of rich
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Phi-3 and models with the same graph from GGUF files, on any tensor library.",
    epilog="""
\b
Examples:
  phicore generate "Write a haiku about ice hockey"
  phicore generate -m path/to/model.gguf -b jax -t 0 "Why is the sky blue?"
  phicore bench --synthetic phi-3-mini
  phicore inspect phi-3-mini
  echo "Hello world" | phicore tokenize
""",
)

MODEL_HELP = (
    "A GGUF file, hf:owner/repo[:Q4_K_M], package:NAME or a name that `phicore models` lists."
)


def complete_model(incomplete: str) -> list[str]:
    """For the shell: the models with a short name. Paths are the shell's own."""
    from phicore.sources import ALIASES

    return [name for name in ALIASES if name.startswith(incomplete)]


def complete_backend(incomplete: str) -> list[str]:
    """For the shell: the installed backends."""
    from phicore.plugins import Plugins

    return [name for name in Plugins().backends() if name.startswith(incomplete)]


def complete_synthetic(incomplete: str) -> list[str]:
    """For the shell: the models of random weights."""
    from phicore.synthetic import MODELS

    return [name for name in MODELS if name.startswith(incomplete)]


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="REF", help=MODEL_HELP, autocompletion=complete_model),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        help="One that `phicore backends` lists.",
        autocompletion=complete_backend,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A device of the backend, such as cpu or cuda:1."),
]
CacheTypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="How keys and values are stored: f32, f16, bf16, i24, i16 or q8_0. "
        "[the backend's default]",
    ),
]
FastPrefillOption = Annotated[
    bool,
    typer.Option("--fast-prefill", help="Read prompts faster, as exactly as llama.cpp does."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="What prompts are multiplied in: float32, or float16 or bfloat16 on a GPU. "
        "[the backend's default]",
    ),
]
CompactOption = Annotated[
    bool,
    typer.Option("--compact", help="Round the scales of quantized weights to save memory."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Threads that compute. [one for each processor]"),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A tokenizer.json to use instead of the model's own."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _switch_plugins_off(is_off: bool) -> None:
    if is_off:
        from phicore.plugins import DISABLE

        os.environ[DISABLE] = "*"


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
    no_plugins: Annotated[
        bool,
        typer.Option(
            "--no-plugins",
            help="Use no plugins but phicore's own backends.",
            is_eager=True,
            callback=_switch_plugins_off,  # before a command is looked for
        ),
    ] = False,
) -> None:
    if version:
        from phicore import __version__

        print(f"phicore {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command(
    epilog="""
\b
Examples:
  phicore generate "Write a haiku about ice hockey"
  phicore generate -m phi-3-mini -n 100 -t 1 --repeat-penalty 1.2 "Write a haiku"
  phicore generate -m hf:owner/repo:Q4_K_M -s "Be brief." "Why is the sky blue?"
  git diff | phicore generate -t 0 --json -
  phicore generate --raw $'<|user|>\\nHello<|end|>\\n<|assistant|>'
"""
)
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT|-",
            help="What to say to the model; - (or nothing, in a pipe) reads standard input.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    backend: BackendOption = None,
    device: DeviceOption = None,
    system: Annotated[
        str | None, typer.Option("--system", "-s", metavar="TEXT", help="A system message.")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Take the prompt as it is, special tokens included: no chat template."
        ),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", metavar="N", min=1, help="How many tokens at most.")
    ] = 256,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", "-t", help="0 is greedy. [the model's, else 0.7]"),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Only the k most probable tokens. [the model's, else all]")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Only the most probable tokens that hold p. [the model's, else 1]"),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Only tokens with this share of the best one's. [the model's, else 0]"),
    ] = None,
    repeat_penalty: Annotated[
        float | None, typer.Option(help="1 is none. [the model's, else 1.1]")
    ] = None,
    repeat_last_n: Annotated[
        int | None,
        typer.Option(help="How far back the penalty looks; -1 is all. [the model's, else 64]"),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=2**64 - 1,
            help="The same seed gives the same text, on every backend. [random; --stats prints it]",
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this string; may be given again."),
    ] = None,
    ctx: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens that prompt and answer may have. [as many as the model allows]",
        ),
    ] = None,
    cache_type: CacheTypeOption = None,
    fast_prefill: FastPrefillOption = False,
    dtype: DtypeOption = None,
    compact: CompactOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    stats: Annotated[
        bool, typer.Option("--stats/--no-stats", help="Print figures on standard error.")
    ] = True,
) -> None:
    """Generate text."""
    from phicore.console import Console, stats_lines
    from phicore.sampler import Sampling
    from phicore.stopping import StopStrings

    text = read_text(prompt)
    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "repeat_last_n": repeat_last_n,
    }
    Sampling(**{k: v for k, v in options.items() if v is not None})  # before a long load
    StopStrings(stop or [])
    if raw and system is not None:
        raise ArgumentError("--system: a raw prompt has no system message")

    from phicore.model import load

    console = Console()
    reference = model or console.default_model()
    with (
        console.progress() as progress,  # also while the steps are compiled
        load(
            reference,
            backend,
            device,
            ctx,
            tokenizer=tokenizer,
            cache_type=cache_type,
            fast_prefill=fast_prefill,
            dtype=dtype,
            compact=compact,
            threads=threads,
            progress=progress,
        ) as loaded,
    ):
        generation = loaded.generate(
            text,
            max_tokens=max_tokens,
            seed=seed,
            stop=stop or [],
            system=system,
            raw=raw,
            **options,
        )
        pieces: list[Piece] = []
        interrupted = False
        try:
            with swallowed_interrupts() as swallowed:
                for piece in generation:
                    pieces.append(piece)
                    if not as_json and piece.text:
                        console.text_begins()
                        sys.stdout.write(piece.text)
                        sys.stdout.flush()
                    if swallowed:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            interrupted = True
        finally:
            generation.close()
        if as_json:
            print(json.dumps(_result(loaded, generation, pieces), ensure_ascii=False))
        elif pieces:
            print(flush=True)
        if pieces and pieces[-1].finish_reason == "context":
            console.say(f"stopped: the context of {loaded.context} tokens is full")
        if stats and pieces:
            for line in stats_lines(loaded, generation):
                console.say(line)
    if interrupted:
        raise KeyboardInterrupt


def _result(model: Model, generation: Generation, pieces: list[Piece]) -> dict[str, Any]:
    from dataclasses import asdict

    reason = pieces[-1].finish_reason if pieces else None
    timings = asdict(generation.timings)
    return {
        "text": "".join(piece.text for piece in pieces),
        "finish_reason": reason or "interrupted",
        "token_ids": [piece.token_id for piece in pieces],
        "prompt_ids": generation.prompt_ids,
        "seed": generation.seed,
        "model": model.reference,
        "backend": model.backend,
        "stats": {
            "load_s": model.load_s,
            **timings,
            "prompt_tokens_per_s": generation.timings.prompt_tokens_per_s,
            "decode_tokens_per_s": generation.timings.decode_tokens_per_s,
            "peak_memory_bytes": model.peak_memory_bytes(),
        },
    }


@app.command(
    epilog="""
\b
Examples:
  phicore bench -m phi-3-mini
  phicore bench --synthetic phi-3-mini -p 128,512 -n 64 -d 0,1024 --markdown
  phicore bench -b numpy -p 0 -n 32 -r 3 --json
"""
)
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
            progress=show,
        ) as loaded:
            found = measure(loaded, rows, repetitions, progress)
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    elif markdown:
        print_markdown(found)
    else:
        print_table(found)


@app.command()
def inspect(
    ref: Annotated[str | None, typer.Argument(metavar="REF", help=MODEL_HELP)] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the hyperparameters, tensors and tokenizer of a GGUF file."""
    from phicore.console import Console
    from phicore.inspection import inspect_model, print_inspection

    found = inspect_model(ref or Console().default_model())
    if as_json:
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        print_inspection(found)


@app.command()
def tokenize(
    text: Annotated[
        str | None, typer.Argument(help="The text; - (or nothing, in a pipe) reads standard input.")
    ] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the chat template, as `generate` does.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the tokens of a text: ids and pieces."""
    from phicore.console import Console
    from phicore.inspection import open_tokenizer

    text = read_text(text)
    tok, template = open_tokenizer(model or Console().default_model(), tokenizer)
    ids = tok.encode(template.render([{"role": "user", "content": text}]) if chat else text)
    if as_json:
        tokens = [{"id": i, "piece": _printable(tok.piece(i))} for i in ids]
        print(json.dumps(tokens, ensure_ascii=False))
    else:
        for i in ids:
            print(f"{i:>7}  {_printable(tok.piece(i))}")


def _printable(piece: str) -> str:
    """A piece on one line; bytes that are no UTF-8, and control characters, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)


@app.command(
    epilog="""
\b
Examples:
  phicore parity -b jax,mlx,numpy
  phicore parity -m model.gguf -b jax --against reference.npz
  phicore parity -b numpy,jax --trace
"""
)
def parity(
    model: ModelOption = None,
    backends: Annotated[
        str | None,
        typer.Option(
            "--backends",
            "-b",
            metavar="NAME,...",
            help="The first is what the others are compared with. [all that work here]",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npz", help="Compare with logits that tools/make_reference.py has made."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Read this; may be repeated.")
    ] = None,
    n_gen: Annotated[
        int,
        typer.Option("--n-gen", "-n", metavar="N", min=0, help="Tokens of greedy text to compare."),
    ] = 32,
    max_error: Annotated[
        float, typer.Option(metavar="X", help="The largest relative error of the logits.")
    ] = 1e-4,
    trace: Annotated[
        bool, typer.Option("--trace", help="Find the first operation at which backends part.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare backends with each other, or with a reference, on the same prompts.

    The exit code is 1 if one is further off than --max-error.
    """
    from phicore.console import Console, table
    from phicore.parity import PROMPTS
    from phicore.parity import parity as run
    from phicore.plugins import usable_backends

    names = backends.split(",") if backends else usable_backends()
    console = Console()
    reference = model or console.default_model()
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
                print(f"{part['name']}: parts nowhere")
            else:
                print(f"{part['name']}: parts at {where}, by {part['errors'][where]:.1e}")
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


@app.command(
    epilog="""
\b
Examples:
  phicore conformance -b numpy
  phicore conformance -b jax -k "attention and not large"
"""
)
def conformance(
    backend: BackendOption = None,
    device: DeviceOption = None,
    keyword: Annotated[
        str,
        typer.Option("-k", metavar="EXPRESSION", help="Only tests that fit, as for pytest -k."),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Test a backend: every operation, every quantization, whole models.

    Needs phicore[testing]. The exit code is 1 if a test fails.
    """
    from phicore.console import Console, table
    from phicore.plugins import Plugins, choose_backend
    from phicore.testing.runner import parts_of, run

    info = choose_backend(backend, Plugins())
    info.create(device)  # an error is told before the tests begin
    with Console().progress() as progress:
        results = run(lambda: info.create(device), keyword=keyword, progress=progress)
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


@app.command("new-backend")
def new_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What `--backend` is to take.")],
    into: Annotated[
        Path, typer.Option("--into", metavar="FOLDER", help="Where to put it. [here]")
    ] = Path(),
) -> None:
    """Write the skeleton of a backend: a plugin that computes on NumPy, with its tests."""
    from phicore.new_backend import write_backend

    for path in write_backend(name, into):
        print(path)


@app.command()
def plugins(as_json: JsonOption = False) -> None:
    """List the installed plugins, what they provide, and which cannot be used."""
    from phicore.console import table
    from phicore.plugins import Plugins

    found = Plugins()
    cells: list[tuple[str, str, str | None, str]] = [
        (p.name, p.distribution, p.version, "; ".join(p.provides) or "provides nothing")
        for p in found.installed()
    ]
    cells += [(p.name, p.distribution, None, f"not usable: {p.reason}") for p in found.broken]
    cells += [(name, owner, None, "switched off") for name, owner in found.disabled]
    columns = ["name", "distribution", "version", "status"]
    if as_json:
        rows = [dict(zip(columns, row, strict=True)) for row in cells]
        print(json.dumps(rows, ensure_ascii=False, indent=2))
        return
    table(columns, [[cell or "-" for cell in row] for row in cells])


@app.command()
def backends(as_json: JsonOption = False) -> None:
    """List the installed backends and whether they work here."""
    from phicore.console import table
    from phicore.plugins import Plugins

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


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the models with a short name and those in the Hub cache."""
    from phicore.console import Console, size, table
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
