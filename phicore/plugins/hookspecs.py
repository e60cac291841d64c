"""The hooks a plugin can implement, through the entry-point group `phicore`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pluggy

if TYPE_CHECKING:
    from phicore.backend import Backend, BackendOptions
    from phicore.engine.timings import Timings
    from phicore.network.architectures import Architecture
    from phicore.network.config import Phi3Config
    from phicore.network.processors import LogitsProcessor
    from phicore.sources import ModelFiles
    from phicore.text.pieces import Piece
    from phicore.text.tokenizer import Tokenizer

hookspec = pluggy.HookspecMarker("phicore")
hookimpl = pluggy.HookimplMarker("phicore")


class LoadedModel(Protocol):
    """What a plugin may use of a `phicore.Model`."""

    config: Phi3Config
    """The hyperparameters."""
    vocab_size: int
    """How many tokens the embedding has."""
    tokenizer: Tokenizer
    """Text to tokens and back."""
    metadata: dict[str, Any]
    """All key-value pairs of the file."""


class RunningGeneration(Protocol):
    """What a plugin may use of a `phicore.Generation`."""

    seed: int
    """The seed in use."""
    prompt_ids: list[int]
    """The tokens of the prompt."""
    timings: Timings
    """What was done so far, and how long it took."""


CreateProcessor: TypeAlias = "Callable[[str, LoadedModel], LogitsProcessor]"
"""What makes a logits processor of an argument, for a model."""


class RegisterBackend(Protocol):
    """Tells phicore of a backend."""

    def __call__(
        self,
        name: str,
        *,
        create: Callable[[BackendOptions], Backend],
        devices: Callable[[], list[str]],
        protocol: int,
        notes: Callable[[], str] | None = None,
    ) -> None:
        """
        Args:
            name: What `--backend` takes.
            create: Makes the backend with the options that a user chose. The tensor library is
                imported in here, not before; what it raises is shown as the reason why the backend
                cannot be used.
            devices: Names the devices of this machine that the backend can use.
            protocol: The version of the tensor protocol that the backend was written for, as a
                number: what `phicore.backend.VERSION` was then. It is used with no other version.
            notes: What `phicore backends` says beside "usable", such as which kernels are in use.
        """


class RegisterSource(Protocol):
    """Tells phicore of a kind of model reference."""

    def __call__(self, scheme: str, *, resolve: Callable[[str], ModelFiles]) -> None:
        """
        Args:
            scheme: What stands before the colon of a reference, such as `hf`.
            resolve: Takes the whole reference and gives the files, fetched if need be.
        """


class RegisterArchitecture(Protocol):
    """Tells phicore of a family of GGUF files."""

    def __call__(self, architecture: Architecture) -> None:
        """
        Args:
            architecture: How the hyperparameters and tensors of files with its name in
                `general.architecture` become those of the graph.
        """


class RegisterLogitsProcessor(Protocol):
    """Tells phicore of a kind of logits processor."""

    def __call__(self, name: str, *, create: CreateProcessor) -> None:
        """
        Args:
            name: What stands before the `=` of `--processor NAME=ARGUMENT`.
            create: Makes one for a generation, of the argument, perhaps "", and the model; for an
                argument that it cannot use it raises `phicore.ArgumentError`.
        """


class RegisterCommand(Protocol):
    """Tells phicore of a command."""

    def __call__(self, name: str, function: Callable[..., None]) -> None:
        """
        Args:
            name: What is typed after `phicore`; not one of phicore's own.
            function: Runs it. Its parameters are the command's, annotated as typer wants them, and
                its docstring is the help. A `phicore.PhicoreError` that it raises is told in a
                line; `typer.Exit(code)` ends the program.
        """


@hookspec
def phicore_register_backends(register: RegisterBackend) -> None:
    """Called when backends are looked for; call `register` for each that the plugin has.

    Import no tensor library here: listing backends must be quick.
    """


@hookspec
def phicore_register_sources(register: RegisterSource) -> None:
    """Called when a model reference is resolved; call `register` for each scheme."""


@hookspec
def phicore_register_architectures(register: RegisterArchitecture) -> None:
    """Called when a model file is opened; call `register` for each architecture."""


@hookspec
def phicore_register_logits_processors(register: RegisterLogitsProcessor) -> None:
    """Called when a model is loaded; call `register` for each kind of processor."""


@hookspec
def phicore_register_commands(register: RegisterCommand) -> None:
    """Called when the command line is read; call `register` for each command.

    Import what a command needs when it runs: `phicore --help` must be quick.
    """


@hookspec
def phicore_generation_started(generation: RunningGeneration) -> None:
    """Called when the first token of a generation is asked for, before anything is computed.

    As the two hooks below it is called in the thread that generates, which waits for it. What it
    raises goes to the log, and this plugin is not called again in this model.
    """


@hookspec
def phicore_piece_generated(generation: RunningGeneration, piece: Piece) -> None:
    """Called for each token, before it is handed out."""


@hookspec
def phicore_generation_ended(generation: RunningGeneration, error: BaseException | None) -> None:
    """Called once after the last token, or when a generation is closed early or fails.

    `generation.timings` then says what was done and how long it took.
    """
