"""`phicore generate`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

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
    TokenizerOption,
    model_or_default,
)
from phicore.cli.stdin import read_text
from phicore.errors import ArgumentError
from phicore.lab.interrupts import swallowed_interrupts

if TYPE_CHECKING:
    from phicore.model import Generation, Model, Piece


EXAMPLES = """
\b
Examples:
  phicore generate "Give me three tips for better sleep."
  phicore generate -m phi-3-mini -n 100 -t 1 --repeat-penalty 1.2 "Write a haiku"
  phicore generate -m hf:owner/repo:Q4_K_M -s "Be brief." "Why is the sky blue?"
  git diff | phicore generate -t 0 --json -
  phicore generate --raw $'<|user|>\\nHello<|end|>\\n<|assistant|>'
"""


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
        typer.Option("--temperature", "-t", help="0 is greedy. [the model's, else 0.8]"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Keep the k most probable tokens; 0 keeps all. [the model's, else 40]"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Keep the smallest set of tokens whose probabilities reach p; 1 keeps all. "
            "[the model's, else 0.95]"
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Drop tokens less likely than this fraction of the best one; 0 drops none. "
            "[the model's, else 0.05]"
        ),
    ] = None,
    repeat_penalty: Annotated[
        float | None,
        typer.Option(help="Make recent tokens less likely; 1 does not. [the model's, else 1.0]"),
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
    processor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ARG",
            help="Change the scores before a token is chosen: logit-bias=ID:BIAS,..., "
            "frequency-penalty=X, presence-penalty=X, or a plugin's; may be given again.",
        ),
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
    devices: DevicesOption = 1,
    as_json: JsonOption = False,
    stats: Annotated[
        bool, typer.Option("--stats/--no-stats", help="Print figures on standard error.")
    ] = True,
) -> None:
    """Generate text."""
    from phicore.cli.terminal import Console, stats_lines
    from phicore.network.sampler import Sampling
    from phicore.text.stop_strings import StopStrings

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
    reference = model_or_default(model, console.say)
    with (
        swallowed_interrupts() as swallowed,
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
            devices=devices,
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
            processors=processor or [],
            **options,
        )
        pieces: list[Piece] = []
        interrupted = False
        try:
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
