"""The hooks that a plugin can implement. Plugins are found by the entry-point group `phicore`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pluggy

if TYPE_CHECKING:
    from phicore.backend import Backend, BackendOptions, ProcessGroup
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
    """The attributes of a `phicore.Model` that a plugin may use."""

    config: Phi3Config
    """The hyperparameters."""
    vocab_size: int
    """The number of tokens that the embedding has."""
    tokenizer: Tokenizer
    """The tokenizer, which turns text into tokens and back."""
    metadata: dict[str, Any]
    """All key-value pairs of the file."""


class RunningGeneration(Protocol):
    """The attributes of a `phicore.Generation` that a plugin may use."""

    seed: int
    """The seed in use."""
    prompt_ids: list[int]
    """The tokens of the prompt."""
    timings: Timings
    """The times and token counts so far."""


CreateProcessor: TypeAlias = "Callable[[str, LoadedModel], LogitsProcessor]"
"""A function that makes a logits processor from an argument, for a model."""


class RegisterBackend(Protocol):
    """Registers a backend."""

    def __call__(
        self,
        name: str,
        *,
        create: Callable[[BackendOptions], Backend],
        devices: Callable[[], list[str]],
        protocol: int,
        notes: Callable[[], str] | None = None,
        join: Callable[[ProcessGroup], Callable[[], None]] | None = None,
    ) -> None:
        """
        Args:
            name: The name of the backend, as `--backend` takes it.
            create: Makes the backend with the options that the user chose. Import the tensor
                library inside this function, not before. If it raises, the error is shown as the
                reason why the backend cannot be used.
            devices: Returns the names of the devices on this machine that the backend can use.
            protocol: The version of the tensor protocol that the backend was written for, as a
                number: the value of `phicore.backend.VERSION` at that time. phicore uses the
                backend only if it has the same version.
            notes: Returns what `phicore backends` prints after "usable", such as the kernels in
                use.
            join: Joins this process with others, so that a backend that is made later can use the
                devices of all of them, and returns a function that leaves them. Leave it out if
                the backend cannot do this.
        """


class RegisterSource(Protocol):
    """Registers a scheme of model references."""

    def __call__(self, scheme: str, *, resolve: Callable[[str], ModelFiles]) -> None:
        """
        Args:
            scheme: The part of a reference before the colon, such as `hf`.
            resolve: Takes the whole reference and returns the files. It downloads them if needed.
        """


class RegisterArchitecture(Protocol):
    """Registers an architecture, a family of GGUF files."""

    def __call__(self, architecture: Architecture) -> None:
        """
        Args:
            architecture: The architecture, for files that have its name in `general.architecture`.
                It maps their hyperparameters and tensors to those of the graph.
        """


class RegisterLogitsProcessor(Protocol):
    """Registers a kind of logits processor."""

    def __call__(self, name: str, *, create: CreateProcessor) -> None:
        """
        Args:
            name: The NAME in `--processor NAME=ARGUMENT`.
            create: Makes a processor for a generation, from the argument (perhaps "") and the
                model. It raises `phicore.ArgumentError` for an argument that it cannot use.
        """


class RegisterCommand(Protocol):
    """Registers a command."""

    def __call__(self, name: str, function: Callable[..., None]) -> None:
        """
        Args:
            name: The name of the command after `phicore`. It must not be that of a command of
                phicore.
            function: Runs the command. Its parameters become the command's, by typer's
                annotations, and its docstring becomes the help. If it raises a
                `phicore.PhicoreError`, the error is printed as one line. `typer.Exit(code)` ends
                the program.
        """


@hookspec
def phicore_register_backends(register: RegisterBackend) -> None:
    """Register the plugin's backends. The hook is called when backends are listed or chosen.

    Do not import a tensor library here, since listing backends must be quick.
    """


@hookspec
def phicore_register_sources(register: RegisterSource) -> None:
    """Register the plugin's schemes. The hook is called when a model reference is resolved."""


@hookspec
def phicore_register_architectures(register: RegisterArchitecture) -> None:
    """Register the plugin's architectures.

    The hook is called when a model is loaded or inspected.
    """


@hookspec
def phicore_register_logits_processors(register: RegisterLogitsProcessor) -> None:
    """Register the plugin's kinds of logits processors.

    The hook is called when a model is loaded.
    """


@hookspec
def phicore_register_commands(register: RegisterCommand) -> None:
    """Register the plugin's commands. The hook is called when the command line is parsed.

    Import the modules that a command needs inside the command, since `phicore --help` must be
    quick.
    """


@hookspec
def phicore_generation_started(generation: RunningGeneration) -> None:
    """Observe the start of a generation.

    The hook is called when the first token is requested, before anything is computed. This hook
    and the two below are called in the thread that generates, which waits for them. If a hook
    raises, the error is logged, and the plugin's observer hooks are not called again for this
    model.
    """


@hookspec
def phicore_piece_generated(generation: RunningGeneration, piece: Piece) -> None:
    """Observe a piece. The hook is called for each token, before the caller gets the piece."""


@hookspec
def phicore_generation_ended(generation: RunningGeneration, error: BaseException | None) -> None:
    """Observe the end of a generation.

    The hook is called once: after the last token, or when a generation is closed early or fails.
    `generation.timings` then has the final times and token counts.
    """
