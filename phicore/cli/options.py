"""The options that several commands share, and the shell completion of their values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer

from phicore import settings
from phicore.errors import ArgumentError

T = TypeVar("T")

MODEL_HELP = (
    "The model: a GGUF file, hf:owner/repo[:Q4_K_M] on the Hugging Face Hub, package:NAME, or a "
    "short name that `phicore models` lists."
)


def model_or_default(model: str | None, say: Callable[[str], None]) -> str:
    """Return the model that the user named, or the default model.

    If it is the default, tell the user which model it is; of the demo, also how to get Phi-3.
    """
    if model is not None:
        return model
    from phicore.sources import DEMO, default_reference

    reference, why = default_reference()
    hint = "; for Phi-3 itself: --model phi-3-mini" if why == DEMO else ""
    say(f"model: {reference} ({why}){hint}")
    return reference


def complete_model(incomplete: str) -> list[str]:
    """Complete the short name of a model in the shell, which completes paths itself."""
    from phicore.sources import ALIASES

    return [name for name in ALIASES if name.startswith(incomplete)]


def complete_backend(incomplete: str) -> list[str]:
    """Complete the name of an installed backend in the shell."""
    from phicore.plugins import Plugins

    return [name for name in Plugins().backends() if name.startswith(incomplete)]


def complete_synthetic(incomplete: str) -> list[str]:
    """Complete the name of a model with random weights in the shell."""
    from phicore.lab.synthetic import MODELS

    return [name for name in MODELS if name.startswith(incomplete)]


def bytes_of(text: str, parameter: str = "kv_memory", least: int = 1) -> int:
    """Return the number of bytes that a text such as "4GB" or "500 MB" says.

    Args:
        parameter: The name of the parameter, for the error.
        least: The smallest allowed number.
    Raises:
        ArgumentError: If it says none.
    """
    size = settings.bytes_of(text)
    if size is None or size < least:
        raise ArgumentError(parameter=parameter, expected="a size such as 4GB", got=text)
    return size


def guessing(speculation: bool | None, draft_model: str | None) -> dict[str, Any]:
    """Return the arguments of `phicore.load` that say who guesses tokens.

    Raises:
        ArgumentError: If the options contradict each other.
    """
    if draft_model is not None and speculation is False:
        raise ArgumentError("not together with --no-speculation", parameter="draft_model")
    return {"speculation": bool(speculation), "draft_model": draft_model}


def takes(
    parameter: str, settings: type, *, else_of: str = ""
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Return a decorator that replaces a command's parameter by options, one for each setting.

    Args:
        parameter: The parameter to replace. It gets a dictionary of the values by name.
        settings: A dataclass of `phicore.settings.setting` fields.
        else_of: The source of the values of options that the user does not give, such as "the
            model's". Their value is then None, and help texts name the source. If it is "", their
            value is the field's default.
    """

    def decorated(function: Callable[..., T]) -> Callable[..., T]:
        @wraps(function)
        def command(**arguments: Any) -> T:
            values = {each.name: arguments.pop(each.name) for each in fields(settings)}
            return function(**arguments, **{parameter: values})

        _replace(
            command, function, parameter, [_option(field, else_of) for field in fields(settings)]
        )
        return command

    return decorated


def takes_those_of(
    made: Callable[..., Any], parameter: str
) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Return a decorator that replaces a command's parameter by the options of a function.

    Args:
        made: The function. It is called with its options before the command.
        parameter: The parameter to replace. It gets what the function returns.
    """
    options = list(inspect.signature(made, eval_str=True).parameters.values())

    def decorated(function: Callable[..., T]) -> Callable[..., T]:
        @wraps(function)
        def command(**arguments: Any) -> T:
            values = {each.name: arguments.pop(each.name) for each in options}
            return function(**arguments, **{parameter: made(**values)})

        _replace(command, function, parameter, options)
        return command

    return decorated


def _replace(
    command: Callable[..., Any],
    function: Callable[..., Any],
    parameter: str,
    options: Sequence[inspect.Parameter],
) -> None:
    """Give a command the signature of a function, with options in the place of a parameter."""
    signature = inspect.signature(function, eval_str=True)
    found: list[inspect.Parameter] = []
    for each in signature.parameters.values():
        found += options if each.name == parameter else [each]
    command.__signature__ = signature.replace(parameters=found)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in found}


def _option(field: Field[Any], else_of: str) -> inspect.Parameter:
    """Make the option for a field of the settings."""
    about, kind = field.metadata, {"int": int, "float": float, "bool": bool, "str": str}
    base: Any = kind[str(field.type).partition(" | ")[0]]
    default, help = field.default, about["help"]
    shown = about["shown_default"]
    if else_of:
        default, shown = None, f"{else_of}, else {field.default:g}"
    if shown is not None:
        help = f"{help} [{shown}]"
    flag = field.name.replace("_", "-")
    is_on = base is bool and default is True  # and the option to switch it off is what users need
    flags = [f"--{flag}/--no-{flag}" if is_on else f"--{flag}", *about["flags"]]
    option = typer.Option(
        *flags, help=help, metavar=about["metavar"], show_default=base is not bool and shown is None
    )
    kind_or_none: Any = base if default is not None else base | None
    annotation: Any = Annotated[kind_or_none, option]
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, keyword, default=default, annotation=annotation)


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
        help="The tensor library to compute with; `phicore backends` lists those that work here. "
        "[the first that works, of jax, mlx and others]",
        autocompletion=complete_backend,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--ctx",
        "--ctx-size",
        "-c",
        metavar="N",
        min=1,
        help="Context size: the most tokens that a text has, the answer included. [the model's]",
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="A tokenizer.json to use instead of the one in the model file."
    ),
]
SystemOption = Annotated[
    str | None,
    typer.Option("--system", "-s", metavar="TEXT", help="Put this system message in front."),
]
SeedOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Seed of the random numbers; each further answer of a chat has one more. The same "
        "seed gives the same text on every backend. [random]",
    ),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Stop an answer at this string, which is not shown. May be given several times.",
    ),
]
ProcessorOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=ARG",
        help="Change the logits before a token is chosen: logit-bias=ID:BIAS[,ID:BIAS...]; "
        "frequency-penalty=X; presence-penalty=X; or a processor of a plugin. May be given "
        "several times.",
    ),
]
RopeFactorsOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|long",
        help="The rotary factors of models with LongRoPE, such as Phi-3-mini-128k. auto uses the "
        "short factors until the text is longer than the original context, and then reads the "
        "text again with the long factors; long uses these from the beginning. [auto]",
    ),
]
KvMemoryOption = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="The most memory for keys and values, such as 4GB. Requests that do not fit wait, and "
        "the context is what fits. [half of the free memory on a CPU]",
    ),
]
ParallelOption = Annotated[
    int,
    typer.Option(
        "--parallel",
        metavar="N",
        min=1,
        max=64,
        help="The largest number of answers that are computed together.",
    ),
]
SpeculationOption = Annotated[
    bool | None,
    typer.Option(
        "--speculation/--no-speculation",
        help="Guess tokens from what was read and written before, and check several at a time. "
        "The text stays the same, and comes faster where it repeats the prompt or itself. [no]",
        show_default=False,
    ),
]
DraftModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="REF",
        help="Let this smaller model with the same vocabulary guess the other tokens. Implies "
        "--speculation.",
        autocompletion=complete_model,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
