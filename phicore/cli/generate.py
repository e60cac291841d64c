"""The command `phicore generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phicore.backend.options import BackendOptions
from phicore.cli.options import (
    BackendOption,
    ContextOption,
    DraftModelOption,
    JsonOption,
    KvMemoryOption,
    ModelOption,
    ParallelOption,
    ProcessorOption,
    RopeFactorsOption,
    SeedOption,
    SpeculationOption,
    StopOption,
    SystemOption,
    TokenizerOption,
    bytes_of,
    guessing,
    model_or_default,
    takes,
)
from phicore.cli.stdin import read_file, read_text
from phicore.errors import ArgumentError, PhicoreError
from phicore.lab.interrupts import swallowed_interrupts
from phicore.network.sampling import Sampling
from phicore.team.options import TeamOptions

if TYPE_CHECKING:
    from phicore.cli.batch import Batch
    from phicore.cli.terminal import Console, ProgressLine
    from phicore.generation import Generation
    from phicore.model import Model
    from phicore.text.pieces import Piece


EXAMPLES = """
\b
Examples:
  phicore generate "Give me three tips for better sleep."
  phicore generate -m phi-3-mini -n 100 -t 1 --repeat-penalty 1.2 "Write a haiku"
  phicore generate -m hf:owner/repo:Q4_K_M -s "Be brief." "Why is the sky blue?"
  git diff | phicore generate -t 0 --json -
  phicore generate --batch prompts.jsonl --out answers.jsonl
  phicore generate --raw $'<|user|>\\nHello<|end|>\\n<|assistant|>'
"""


@takes("sampling", Sampling, else_of="the file's")
@takes("backend_options", BackendOptions)
@takes("team_options", TeamOptions)
def generate(
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT|-",
            help="The message to the model. With -, or without this argument in a pipe, it is read "
            "from standard input.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="Read the prompt from this file."),
    ] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    backend: BackendOption = None,
    system: SystemOption = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="Use the prompt as it is, without the chat template, a newline at its end "
            "included; <|user|> and the like in it become control tokens.",
        ),
    ] = False,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens",
            "-n",
            metavar="N",
            help="Write at most this many tokens. -1 writes until the context is full.",
        ),
    ] = 256,
    sampling: dict[str, Any],
    seed: SeedOption = None,
    stop: StopOption = None,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos", help="Do not stop at the tokens that end an answer."),
    ] = False,
    processor: ProcessorOption = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|JSON",
            help="Write JSON that follows this schema: a file, or the schema itself, such as "
            '\'{"type": "object"}\'.',
        ),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Write a text that matches this regular expression."),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a text that follows the grammar in this file, in the form of Lark or GBNF.",
        ),
    ] = None,
    ctx: ContextOption = None,
    rope_factors: RopeFactorsOption = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Answer many requests: each line of this file is a JSON object with a prompt (or "
            "messages), and with its own id, seed, max_tokens and so on where it needs them. "
            "Several are computed together; the text of each is the one that it gets alone.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the answers of --batch here, one JSON object a line. Answers that are "
            "there already are not computed again, so an interrupted command can be repeated. "
            "[standard output]",
        ),
    ] = None,
    in_order: Annotated[
        bool,
        typer.Option(
            "--in-order", help="Write the answers of --batch in the order of the requests."
        ),
    ] = False,
    parallel: ParallelOption = 8,
    session: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep what was read and written in this file, so that a later command whose "
            "prompt begins the same way need not read it again.",
        ),
    ] = None,
    kv_memory: KvMemoryOption = None,
    speculation: SpeculationOption = None,
    draft_model: DraftModelOption = None,
    backend_options: dict[str, Any],
    team_options: dict[str, Any],
    as_json: JsonOption = False,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats/--no-stats", help="Print the seed, times and speeds on standard error."
        ),
    ] = True,
) -> None:
    """Write the model's answer to a prompt."""
    from phicore.cli.batch import Batch
    from phicore.cli.terminal import Console, printable, stats_lines
    from phicore.engine import Request

    if batch is not None:
        if prompt is not None or file is not None or as_json or session is not None:
            raise ArgumentError(
                "not together with a prompt, --json or --session", parameter="batch"
            )
        text = ""
    elif out is not None or in_order:
        name = "out" if out is not None else "in_order"
        raise ArgumentError("only together with --batch", parameter=name)
    elif file is not None:
        if prompt is not None:
            raise ArgumentError("leave the prompt out; the file has it", parameter="file")
        text = read_file(file, exact=raw)
    else:
        text = read_text(prompt, exact=raw)
    rope_factors = rope_factors or "auto"
    given = {name: value for name, value in sampling.items() if value is not None}
    # Check the options before a long load. The real request is made later, with the tokenizer.
    Request(
        [0],
        Sampling(**given),
        max_tokens=max_tokens,
        seed=seed,
        stop=stop or (),
        rope_factors=rope_factors,
    )
    BackendOptions(**backend_options)
    constraint = {
        "json_schema": _schema(json_schema),
        "regex": regex,
        "grammar": None if grammar is None else read_file(grammar, parameter="grammar"),
    }
    if any(constraint.values()):
        from phicore.grammar import constraint_of

        constraint_of(**constraint)
    if session is not None and not session.parent.is_dir():
        raise ArgumentError(f"{session.parent}: no such folder", parameter="session")
    kv_bytes = None if kv_memory is None else bytes_of(kv_memory)
    guesses = guessing(speculation, draft_model)
    if raw and system is not None:
        raise ArgumentError("a raw prompt has no system message", parameter="system")
    requests = None if batch is None else Batch(batch, out)

    from phicore.loading import load

    console = Console()
    reference = model_or_default(model, console.say)
    with (
        swallowed_interrupts() as swallowed,
        console.progress() as progress,  # also shows progress while steps are compiled
        load(
            reference,
            backend,
            ctx=ctx,
            tokenizer=tokenizer,
            progress=progress,
            max_sequences=parallel,
            kv_memory=kv_bytes,
            prefix_cache_bytes=None if session is None else 2**62,
            **guesses,
            **backend_options,
            **team_options,
        ) as loaded,
    ):
        if requests is not None:
            defaults = {
                "max_tokens": max_tokens,
                "seed": seed,
                "stop": stop or [],
                "ignore_eos": ignore_eos,
                "system": system,
                "raw": raw,
                "processors": processor or [],
                "rope_factors": rope_factors,
                **constraint,
                **sampling,
            }
            _answer_all(requests, loaded, defaults, in_order, progress, console, swallowed)
            return
        if session is not None and session.exists():
            console.say(f"session: {len(loaded.load_session(session))} tokens")
        generation = loaded.generate(
            text,
            max_tokens=max_tokens,
            seed=seed,
            stop=stop or [],
            ignore_eos=ignore_eos,
            system=system,
            raw=raw,
            processors=processor or [],
            rope_factors=rope_factors,
            **constraint,
            **sampling,
        )
        pieces: list[Piece] = []
        interrupted = False
        shown = printable if sys.stdout.isatty() else str
        try:
            for piece in generation:
                pieces.append(piece)
                if not as_json and piece.text:
                    console.text_begins()
                    sys.stdout.write(shown(piece.text))
                    sys.stdout.flush()
                if swallowed:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            interrupted = True
        finally:
            generation.close()
        if as_json:
            print(json.dumps(_result(loaded, generation, pieces), ensure_ascii=False), flush=True)
        elif pieces:
            print(flush=True)
        if session is not None and not loaded.save_session(session, generation):
            console.say("session: nothing is saved, since the text has too few tokens")
        if pieces and pieces[-1].finish_reason == "context":
            console.say(f"stopped: the context of {loaded.context} tokens is full")
        if stats and pieces:
            for line in stats_lines(loaded, generation):
                console.say(line)
    if interrupted:
        raise KeyboardInterrupt


def _schema(text: str | None) -> str | None:
    """Return a JSON schema that is given as JSON, or as the name of a file."""
    if text is None or text.lstrip().startswith("{"):
        return text
    return read_file(Path(text), parameter="json_schema")


def _answer_all(
    batch: Batch,
    model: Model,
    defaults: dict[str, Any],
    is_in_order: bool,
    progress: ProgressLine,
    console: Console,
    swallowed: list[object],
) -> None:
    """Write the answers to a file of requests, and say which requests have none.

    Raises:
        PhicoreError: If a request has no answer.
    """
    from phicore.cli.batch import run

    if batch.done:
        console.say(f"{batch.done} of {batch.total} answers are there already")
    console.text_begins()  # no progress of single prompts
    run(batch, model, defaults, ordered=is_in_order, line=progress, swallowed=swallowed)
    for problem in batch.problems:
        console.say(problem)
    if batch.problems:
        raise PhicoreError(f"{len(batch.problems)} of {batch.total} requests have no answer")


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
