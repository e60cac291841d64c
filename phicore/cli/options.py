"""The options that several commands have, and what the shell completes them with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

MODEL_HELP = (
    "A GGUF file, hf:owner/repo[:Q4_K_M], package:NAME or a name that `phicore models` lists."
)


def model_or_default(model: str | None, say: Callable[[str], None]) -> str:
    """The model that was asked for; without one, say which is taken, and how to get Phi-3."""
    if model is not None:
        return model
    from phicore.sources import default_reference

    reference, why = default_reference()
    hint = "" if reference == "phi-3-mini" else "; for Phi-3 itself: --model phi-3-mini"
    say(f"model: {reference} ({why}){hint}")
    return reference


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
    from phicore.lab.synthetic import MODELS

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
        help="How keys and values are stored, such as f16, i16 or q8_0; each backend has some of "
        "the types. [the backend's default]",
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
DevicesOption = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="How many devices share the model: cards, with JAX."),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="A tokenizer.json to use instead of the model's own."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
