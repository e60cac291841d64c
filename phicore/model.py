"""The Python API: `load` a model, then `generate` text or look at its `logits`."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from phicore.backend import Backend
from phicore.engine import Engine
from phicore.engine.timings import Timings
from phicore.errors import ArgumentError, GGUFError, PhicoreError
from phicore.gguf.reader import open_gguf
from phicore.network.architectures import BUILT_IN, Architecture, architecture_of
from phicore.network.config import Phi3Config
from phicore.network.processors import LogitsProcessor
from phicore.network.sampler import Sampling
from phicore.network.tensors import vocab_size
from phicore.plugins import Plugins, choose_backend
from phicore.plugins.observers import Observers
from phicore.progress import Progress
from phicore.sources import ModelFiles, default_reference, resolve
from phicore.text.chat_template import ChatTemplate, Message
from phicore.text.pieces import Piece, pieces
from phicore.text.stop_strings import StopStrings
from phicore.text.tokenizer import Tokenizer

Prompt = str | Sequence[Message] | Sequence[int] | np.ndarray

# Recommended sampling parameters, as llama.cpp's converter writes them from generation_config.json.
SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repeat_penalty": "general.sampling.penalty_repeat",
    "repeat_last_n": "general.sampling.penalty_last_n",
}


class Generation:
    """An iterator of `Piece`, one per token, for one thread. It may be closed early or left alone.

    Attributes:
        seed: The seed in use, so that a random one can be used again.
        prompt_ids: The tokens of the prompt.
        timings: What was done so far, and how long it took.
    """

    def __init__(
        self,
        pieces: Iterator[Piece],
        seed: int,
        prompt_ids: list[int],
        timings: Timings,
        observers: Observers | None = None,
    ) -> None:
        self._pieces = pieces if observers is None else observers.watch(self, pieces)
        self.seed = seed
        self.prompt_ids = prompt_ids
        self.timings = timings

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def text(self) -> str:
        """All the text that is still to come."""
        return "".join(piece.text for piece in self)

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()  # type: ignore[attr-defined]  # a generator

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Model:
    """A model on a backend. Made by `load`; a context manager.

    Attributes:
        reference, path: What was asked for, and its GGUF file.
        backend: The name of the backend.
        config: The hyperparameters.
        vocab_size: How many tokens the embedding has.
        tokenizer: Text to tokens and back.
        metadata: All key-value pairs of the file.
        sampling: The sampling parameters where `generate` is given none: the file's recommendation,
            else those of `Sampling`.
        context: How many tokens a prompt and what follows it may have together.
        load_s: How long loading took.
    """

    def __init__(
        self,
        files: ModelFiles,
        ops: Backend,
        *,
        backend: str,
        context: int | None,
        progress: Progress,
        observers: Observers | None = None,
        architectures: Mapping[str, Architecture] = BUILT_IN,
        processors: Mapping[str, Callable[[str, Model], LogitsProcessor]] | None = None,
    ) -> None:
        started = time.perf_counter()
        self.reference = files.reference
        self.path = files.path
        self.backend = backend
        with open_gguf(files.path) as file:
            self.metadata = file.metadata
            try:
                architecture = architecture_of(self.metadata, architectures)
                self.config = architecture.config(self.metadata)
            except GGUFError as error:
                raise GGUFError(f"{file.path.name}: {error}") from None
            self.vocab_size = vocab_size(file)
            self.context = _checked_context(context, self.config)
            self.tokenizer = Tokenizer.of(
                files.tokenizer, self.metadata, explicit=files.tokenizer_is_given
            )
            if self.tokenizer.vocab_size != self.vocab_size:
                raise GGUFError(
                    f"{file.path.name}: tensor 'token_embd.weight' has {self.vocab_size} rows, "
                    f"the tokenizer {self.tokenizer.vocab_size} tokens"
                )
            self.sampling = _recommended_sampling(self.metadata, file.path)
            self._engine: Engine | None = Engine.load(
                ops, file, architecture, context=self.context, progress=progress
            )
        self._ops = ops
        self._observers = observers
        self._processors = processors or {}
        self.load_s = time.perf_counter() - started

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The template that turns messages into a prompt."""
        return ChatTemplate.from_gguf(self.metadata)

    def encode(self, prompt: Prompt, *, system: str | None = None, raw: bool = False) -> list[int]:
        """The tokens of a prompt, as `generate` would use them.

        Args:
            prompt: A string, a list of messages ({"role": ..., "content": ...}), or token ids,
                which are taken as they are.
            system: A system message to put before a string.
            raw: Take a string as it is, special tokens included, instead of as a user's message.
        """
        if isinstance(prompt, str):
            if raw:
                if system is not None:
                    raise ArgumentError("system: a raw prompt has no system message")
                return self.tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
            if system is not None:
                prompt = [{"role": "system", "content": system}, *prompt]
        elif system is not None or raw:
            raise ArgumentError("system, raw: only for a prompt that is a string")
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            return self.tokenizer.encode(self.chat_template.render(prompt))  # type: ignore[arg-type]
        return _checked_ids(prompt, self.vocab_size)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        repeat_last_n: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        system: str | None = None,
        raw: bool = False,
        processors: Sequence[LogitsProcessor | str] = (),
    ) -> Generation:
        """Generate what follows a prompt.

        Args:
            prompt, system, raw: As for `encode`.
            max_tokens: How many tokens at most.
            temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n: As for `Sampling`;
                None takes the model's own `sampling`.
            seed: 0 to 2**64 - 1; the same seed gives the same tokens, on every backend. None takes
                a random one.
            stop: Strings that end the text, which does not hold them.
            ignore_eos: Go on after end tokens.
            processors: Change the scores, one after the other, before a token is chosen: objects,
                each for one generation, or `NAME=ARGUMENT` as on the command line.
        Raises:
            ArgumentError: For a value outside of its range.
            ContextError: If the prompt leaves no room in the context.
        """
        engine = self.engine
        chosen: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repeat_penalty": repeat_penalty,
            "repeat_last_n": repeat_last_n,
        }
        sampling = replace(self.sampling, **{k: v for k, v in chosen.items() if v is not None})
        if not _is_integer(max_tokens) or max_tokens < 1:
            raise ArgumentError(f"max_tokens: expected 1 or more, got {max_tokens!r}")
        seed = secrets.randbits(32) if seed is None else seed
        if not _is_integer(seed) or not 0 <= seed < 2**64:
            raise ArgumentError(f"seed: expected 0 to 2**64 - 1, got {seed!r}")
        max_tokens, seed = int(max_tokens), int(seed)
        ids = self.encode(prompt, system=system, raw=raw)
        room = engine.room_after(ids)
        limit, at_limit = (max_tokens, "length") if max_tokens <= room else (room, "context")
        if isinstance(processors, str) or not isinstance(processors, Sequence):
            raise ArgumentError(f"processors: expected a list of them, got {processors!r:.60}")
        timings = Timings()
        ends = frozenset() if ignore_eos else self.tokenizer.end_token_ids
        tokens = engine.generate(
            ids,
            sampling,
            limit=limit,
            seed=seed,
            timings=timings,
            processors=[self._processor(p) for p in processors],
            ends=ends,
        )
        # A tokenizer that puts a space before every text must not lose the one before a word that
        # goes on from the prompt's last.
        stream = self.tokenizer.stream(
            strip_space=None if self.tokenizer.is_control(ids[-1]) else False
        )
        found = pieces(tokens, limit, at_limit, ends, stream, StopStrings(stop))
        return Generation(found, seed, ids, timings, self._observers)

    def _processor(self, processor: LogitsProcessor | str) -> LogitsProcessor:
        if isinstance(processor, LogitsProcessor):
            return processor
        if not isinstance(processor, str):
            raise ArgumentError(
                f"processor: expected a LogitsProcessor or NAME=ARGUMENT, got {processor!r:.60}"
            )
        name, _, argument = processor.partition("=")
        if name not in self._processors:
            known = ", ".join(self._processors)
            raise ArgumentError(f"processor: expected one of {known}; got {name!r}")
        made = self._processors[name](argument, self)
        if not isinstance(made, LogitsProcessor):
            raise PhicoreError(f"processor {name!r}: made {made!r:.60}, expected a LogitsProcessor")
        return made

    @property
    def engine(self) -> Engine:
        """What runs the network; `phicore.lab` looks inside.

        Raises:
            PhicoreError: If the model is closed.
        """
        if self._engine is None:
            raise PhicoreError("the model is closed; load it again")
        return self._engine

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Scores of the next token after each of these tokens: (T, V) float32.

        Raises:
            ArgumentError: If there is no token, or one outside of the vocabulary.
            ContextError: If they are more than the context.
            PhicoreError: If a score is not a finite number.
        """
        return self.engine.logits(_checked_ids(token_ids, self.vocab_size))

    @property
    def device(self) -> str:
        """The name of the backend's device."""
        return self._ops.device_name

    def peak_memory_bytes(self) -> int | None:
        """The most memory that the process, or the device, has used so far."""
        return self._ops.peak_memory_bytes()

    def close(self) -> None:
        """Let go of the weights; a `Generation` that is still alive keeps them."""
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def load(
    ref: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    device: str | None = None,
    ctx: int | None = None,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    cache_type: str | None = None,
    fast_prefill: bool = False,
    dtype: str | None = None,
    compact: bool = False,
    threads: int | None = None,
    devices: int = 1,
    progress: Progress | None = None,
) -> Model:
    """Load a model.

    Args:
        ref: A path, `hf:owner/repo[:Q4_K_M]`, `package:NAME`, an alias such as `phi-3-mini`, or
            None for the default model.
        backend: The name of an installed backend; None takes the preferred one that works here.
        device: A device of the backend, such as `cpu` or `cuda:1`; None takes the best one.
        ctx: How many tokens a prompt and what follows it may have; None is as many as the model
            was made for.
        tokenizer: A tokenizer.json to use instead of the model's own.
        cache_type: How keys and values are stored: `f32`, `f16`, `bf16`, or integers with scales,
            `i24`, `i16` or `q8_0` (docs/models.md has the error of each). None is the backend's
            default.
        fast_prefill: Read prompts faster, with a relative error of up to 1.3e-2 in the logits.
        dtype: What prompts are multiplied in: `float32`, and on some devices `float16` or
            `bfloat16`. None is the backend's default.
        compact: Round the scales of quantized weights to float16, where the backend keeps them in
            float32: an error of 2e-4 in weights that take a sixth less memory.
        threads: How many threads compute, where the backend can be told; None is its default.
        devices: How many devices share the model, `device` and those after it.
        progress: Called with (what, done, total) while weights are loaded, steps are compiled and
            a prompt is read.
    Raises:
        PhicoreError: One of its subclasses, with a line that says what is wrong and what to do.
    """
    if not _is_integer(devices) or devices < 1:
        raise ArgumentError(f"devices: expected 1 or more, got {devices!r}")
    plugins = Plugins()
    info = choose_backend(backend, plugins) if backend is not None else None
    reference = default_reference()[0] if ref is None else os.fspath(ref)
    files = resolve(reference, tokenizer=tokenizer, schemes=plugins.sources())
    info = info or choose_backend(None, plugins)  # imports the libraries it tries
    ops = info.create(device)
    ops.configure(
        cache_type=cache_type,
        fast_prefill=fast_prefill,
        threads=threads,
        dtype=dtype,
        compact=compact,
        **({"devices": devices} if devices != 1 else {}),
    )
    return Model(
        files,
        ops,
        backend=info.name,
        context=ctx,
        progress=progress or (lambda *_: None),
        observers=plugins.observers(),
        architectures=plugins.architectures(),
        processors=plugins.logits_processors(),
    )


def _checked_context(context: int | None, config: Phi3Config) -> int:
    most = config.max_position_embeddings
    if context is None:
        return most
    if not _is_integer(context) or not 1 <= context <= most:
        raise ArgumentError(f"ctx: expected 1 to {most}, the model's context; got {context!r}")
    return int(context)


def _checked_ids(ids: Any, vocab_size: int) -> list[int]:
    expected = "prompt: expected a string, messages or token ids"
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise ArgumentError(f"{expected}; got {ids!r:.40}")
    checked = []
    for i in ids:
        if not _is_integer(i):
            raise ArgumentError(f"{expected}; found {i!r} in the list")
        if not 0 <= i < vocab_size:
            raise ArgumentError(f"token id {i}: expected 0 to {vocab_size - 1}")
        checked.append(int(i))
    return checked


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _recommended_sampling(metadata: Mapping[str, Any], path: Path) -> Sampling:
    found = {name: metadata[key] for name, key in SAMPLING_KEYS.items() if key in metadata}
    try:
        return Sampling(**found)
    except ArgumentError as error:
        name = str(error).split(":")[0]
        raise GGUFError(f"{path.name}: {SAMPLING_KEYS[name]}: {error}") from None
