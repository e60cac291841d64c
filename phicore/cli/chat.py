"""The command `phicore chat`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phicore.backend.options import BackendOptions
from phicore.cli.options import (
    BackendOption,
    ContextOption,
    DraftModelOption,
    KvMemoryOption,
    ModelOption,
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
from phicore.errors import ArgumentError, PhicoreError
from phicore.network.sampling import Sampling

if TYPE_CHECKING:
    from phicore.chat.conversation import Conversation
    from phicore.chat.store import Store

EXAMPLES = """
\b
Examples:
  phicore chat
  phicore chat -m phi-3-mini -s "Be brief." "Why is the sky blue?"
  phicore chat --resume
  printf 'What is 2 + 2?\\nAnd times 3?\\n' | phicore chat -t 0
"""


@takes("sampling", Sampling, else_of="the file's")
@takes("backend_options", BackendOptions)
def chat(
    *,
    message: Annotated[
        str | None,
        typer.Argument(
            metavar="MESSAGE", help="The first message. Others follow.", show_default=False
        ),
    ] = None,
    model: ModelOption = None,
    tokenizer: TokenizerOption = None,
    backend: BackendOption = None,
    system: SystemOption = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", "-r", help="Go on with the conversation that was changed last."),
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--load",
            "-l",
            metavar="NAME",
            help="Go on with this conversation; /sessions lists the names.",
            autocompletion=lambda incomplete: complete_name(incomplete),
        ),
    ] = None,
    history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history",
            help="Keep the conversation, what was typed, and what the model has read, in the "
            "user's data folder (or PHICORE_DATA).",
        ),
    ] = True,
    saved_size: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="The most space on disk for what the model has read of conversations, so that it "
            "need not read them again. What was not used for longest is removed first.",
        ),
    ] = "2GB",
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            "-n",
            metavar="N",
            help="Write at most this many tokens in an answer. -1 writes until the context is "
            "full. [2048]",
            show_default=False,
        ),
    ] = None,
    sampling: dict[str, Any],
    seed: SeedOption = None,
    stop: StopOption = None,
    processor: ProcessorOption = None,
    ctx: ContextOption = None,
    rope_factors: RopeFactorsOption = None,
    kv_memory: KvMemoryOption = None,
    speculation: SpeculationOption = None,
    draft_model: DraftModelOption = None,
    markdown: Annotated[
        bool,
        typer.Option("--markdown/--no-markdown", help="Render Markdown in answers on a terminal."),
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as a line of JSON.")
    ] = False,
    backend_options: dict[str, Any],
) -> None:
    """Talk with a model.

    On a terminal, /help lists the commands. Without one, each line of standard input is a message
    or a command, and standard output has the answers.
    """
    given = {
        **{name: value for name, value in sampling.items() if value is not None},
        **({} if max_tokens is None else {"max_tokens": max_tokens}),
        **({} if not stop else {"stop": stop}),
        **({} if not processor else {"processors": processor}),
        **({} if rope_factors is None else {"rope_factors": rope_factors}),
    }
    _check(given, seed)
    BackendOptions(**backend_options)
    kv_bytes = None if kv_memory is None else bytes_of(kv_memory)
    guesses = guessing(speculation, draft_model)
    most_bytes = bytes_of(saved_size, "saved_size", least=0)
    if sys.stdin is None:
        raise ArgumentError("standard input is closed")

    from phicore.chat.store import Store, data_path

    store = Store(data_path() / "chats", most_bytes) if history else None
    from phicore.cli.terminal import Console

    console = Console()
    talk = _conversation(store, resume, name, console.say)
    if system is not None:
        talk.system = system
    talk.settings |= given
    if model is None and talk.turns:
        model = talk.turns[-1].model
        console.say(f"model: {model} (the conversation's)")

    from phicore.cli.chat_loop import Loop
    from phicore.lab.interrupts import swallowed_interrupts
    from phicore.loading import load

    reference = model_or_default(model, console.say)
    with (
        swallowed_interrupts() as swallowed,
        _ending_signals(),
        _warnings(console.say),
        console.progress() as progress,
    ):
        loop = Loop(console, progress, swallowed, markdown=markdown, as_json=as_json)
        with load(
            reference,
            backend,
            ctx=ctx,
            tokenizer=tokenizer,
            progress=loop.progress,
            max_sequences=1,
            kv_memory=kv_bytes,
            **guesses,
            **backend_options,
        ) as loaded:
            loop.run(loaded, talk, store, seed=seed, first=message)
    if loop.failures:
        raise typer.Exit(1)


def _check(settings: dict[str, Any], seed: int | None) -> None:
    """Check the options before a long load.

    Raises:
        ArgumentError: If a value is not allowed.
    """
    from phicore.engine import Request

    others = {n: settings[n] for n in ("max_tokens", "stop", "rope_factors") if n in settings}
    sampling = {n: v for n, v in settings.items() if n not in (*others, "processors")}
    Request([0], Sampling(**sampling), seed=seed, **others)


def _conversation(
    store: Store | None, resume: bool, name: str | None, say: Callable[[str], None]
) -> Conversation:
    """Return the conversation that the options name, or a new one.

    Raises:
        PhicoreError: If it cannot be had.
    """
    from phicore.chat.conversation import Conversation

    if not resume and name is None:
        return Conversation()
    if store is None:
        parameter = "resume" if resume else "name"
        raise ArgumentError("not together with --no-history", parameter=parameter)
    if name is not None:
        return store.load(name)
    for newest in store.names():
        try:
            return store.load(newest)
        except PhicoreError as error:
            say(str(error))
    raise PhicoreError("there is no conversation to resume")


@contextmanager
def _warnings(say: Callable[[str], None]) -> Iterator[None]:
    """Show each warning of phicore's once: a chat template gives the same one in every turn."""
    told: set[str] = set()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message not in told:
                told.add(message)
                say(message)

    handler = Handler(logging.WARNING)
    logger = logging.getLogger("phicore")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _ending_signals() -> Iterator[None]:
    """Let signals that end a process end the chat in order, so that what is there is kept."""

    from phicore.cli.chat_signals import ENDING, handled

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    with handled(ENDING, end):
        yield


def complete_name(incomplete: str) -> list[str]:
    """Complete the name of a conversation in the shell."""
    from phicore.chat.store import Store, data_path

    return [name for name in Store(data_path() / "chats", 0).names() if name.startswith(incomplete)]
