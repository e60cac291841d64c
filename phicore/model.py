"""The Python API: a `Model` generates text and computes logits."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from phicore.backend import Backend
from phicore.backend.host import cpu_count, cpu_name
from phicore.engine import Engine, Request
from phicore.engine.draft_model import ModelDrafter
from phicore.engine.drafts import Drafter, Either, NGrams
from phicore.engine.forced import Forced
from phicore.engine.scheduler import MAX_SEQUENCES, Scheduler
from phicore.engine.team import ALONE, Team
from phicore.errors import ArgumentError, GGUFError, PhicoreError, about
from phicore.generation import Answer, Answers, Generation, in_order
from phicore.gguf.reader import open_gguf
from phicore.grammar import AllowedTokens
from phicore.grammar.vocabulary import Vocabulary
from phicore.network.architectures import BUILT_IN, Architecture, architecture_of
from phicore.network.processors import LogitsProcessor
from phicore.network.sampling import recommended
from phicore.network.weights import read_config
from phicore.plugins import BrokenPlugin
from phicore.plugins.observers import Observers
from phicore.progress import Progress
from phicore.prompting.arguments import (
    check_same_vocabulary,
    checked_context,
    checked_drafter,
    checked_ids,
    checked_kv_memory,
    checked_prefix_bytes,
)
from phicore.prompting.prompts import Prompt, Prompts
from phicore.prompting.requests import Requests
from phicore.prompting.tokenizers import tokenizer_of
from phicore.sources import ModelFiles
from phicore.text.chat_template import ChatTemplate
from phicore.text.logprobs import TokenLogprobs
from phicore.text.messages import Message
from phicore.text.pieces import Pieces
from phicore.text.stop_strings import StopStrings
from phicore.tools import CallFormat

log = logging.getLogger(__name__)

SPECULATION = False
"""Whether tokens are guessed by default."""


class Model:
    """A model on a backend. `load` makes it, and it is a context manager.

    Attributes:
        reference: The reference that the user gave.
        path: The path of the GGUF file.
        backend: The name of the backend.
        config: The hyperparameters.
        vocab_size: The number of tokens that the embedding has.
        tokenizer: The tokenizer, which turns text into tokens and back.
        metadata: All key-value pairs of the file.
        sampling: The sampling parameters that `generate` uses by default: the file's
            recommendations, and the defaults of `Sampling` for the rest.
        context: The largest number of tokens that a prompt and its answer may have together.
        broken_plugins: The installed plugins that could not be used.
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
        max_sequences: int = MAX_SEQUENCES,
        prefix_cache_bytes: int | None = None,
        kv_memory: int | None = None,
        speculation: bool | Drafter = SPECULATION,
        draft_model: Model | None = None,
        team: Team = ALONE,
        broken_plugins: Sequence[BrokenPlugin] = (),
    ) -> None:
        self.broken_plugins = tuple(broken_plugins)
        self._started_s, self._load_s = time.perf_counter(), 0.0
        self.reference = files.reference
        self.path = files.path
        self.backend = backend
        name, others = files.path.name, () if files.tokenizer is None else (str(files.tokenizer),)
        with open_gguf(files.path) as file, about(name, *others):
            self.metadata = file.metadata
            architecture = architecture_of(self.metadata, architectures, tensors=file.tensors)
            self.config = read_config(file, architecture)
            self.vocab_size = self.config.vocab_size
            told = f"{file.fingerprint()} {self.config!r}"  # the same tensors can be two models
            self._fingerprint = hashlib.sha256(told.encode()).hexdigest()[:32]
            if team.agreed(self._fingerprint) != self._fingerprint:
                raise GGUFError(f"{name}: not the file that the process has which leads the team")
            programs = ops.kept_programs(self._fingerprint)  # loads them while the rest is made
            self.context = checked_context(context, self.config)
            self.tokenizer = tokenizer_of(files, self.metadata)
            self._prompts = Prompts(self.tokenizer, self.metadata, name)
            self._requests = Requests(self._prompts)
            if self.tokenizer.vocab_size != self.vocab_size:
                raise GGUFError(
                    f"{file.path.name}: tensor 'token_embd.weight' has {self.vocab_size} rows, "
                    f"the tokenizer {self.tokenizer.vocab_size} tokens"
                )
            drafter = checked_drafter(speculation)
            if draft_model is not None:
                check_same_vocabulary(self.tokenizer, draft_model.tokenizer, draft_model.path.name)
                if ops.capabilities.steps > 1:
                    log.warning("guesses are not checked on this device: the draft model is unused")
                other = ModelDrafter(draft_model.engine.runner, draft_model.context)
                drafter = Either(drafter or Forced(NGrams()), other)
            self.sampling, left_out = recommended(self.metadata)
            if left_out:
                log.warning("%s: recommended, but not used: %s", name, ", ".join(left_out))
            self._engine: Engine | None = Engine.load(
                ops,
                file,
                architecture,
                self.config,
                context=self.context,
                progress=progress,
                scheduler=Scheduler(max_sequences=max_sequences),
                prefix_bytes=team.agreed(checked_prefix_bytes(prefix_cache_bytes)),
                kv_bytes=team.agreed(checked_kv_memory(kv_memory, ops)),
                drafter=drafter,
                programs=programs,
            )
            if kv_memory is not None:
                self._engine.fit_context()
                self.context = self._engine.context
            self._engine.team = team
        self._ops = ops
        self._observers = observers
        self._processors = processors or {}
        self._made_s = time.perf_counter()

    @property
    def chat_template(self) -> ChatTemplate:
        """Return the template that turns messages into a prompt."""
        return self._prompts.chat_template

    @property
    def call_format(self) -> CallFormat:
        """Return the form in which the model writes calls, which its chat template tells."""
        return self._prompts.call_format

    def encode(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Turn a prompt into tokens, as `generate` does.

        Args:
            prompt: A string, a list of messages ({"role": ..., "content": ...}), or token ids,
                which are used unchanged.
            system: A system message to put before a prompt that is a string.
            raw: Whether to use a string unchanged; spellings such as "<|user|>" in it become
                control tokens. If False, the string is a user's message in the chat template, and
                such spellings are text, as in all messages except the assistant's.
            tools: The functions that the model may call, in the form of OpenAI's API. The prompt
                tells them as the model's chat template does, or else in the system message.
            documents: Texts that the model may cite, for the chat template.
            chat_template_kwargs: Other variables of the chat template, such as `enable_thinking`.
        """
        return self._prompts.encode(
            prompt,
            system=system,
            raw=raw,
            tools=tools,
            documents=documents,
            chat_template_kwargs=chat_template_kwargs,
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of the prompt that messages make, for people to read.

        `encode` makes tokens of it, and keeps control tokens in the user's texts from having an
        effect, which this text cannot show. The arguments are those of `encode`.
        """
        return self._prompts.render(
            messages,
            tools=tools,
            documents=documents,
            chat_template_kwargs=chat_template_kwargs,
        )

    def request(self, prompt: Prompt, **options: Any) -> Request:
        """Make a request from the arguments of `generate`, and check it."""
        return self._requests.request(prompt, self.sampling, self._processor, **options)

    def generate(self, prompt: Prompt | Request, **options: Any) -> Generation:
        """Generate the answer to a prompt.

        Args:
            prompt: A prompt that `encode` takes, or a request, which allows no further options.
            max_tokens: The largest number of new tokens; 256 by default. -1 continues until the
                context is full.
            temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n: The fields of
                `Sampling`. None takes the value of the model's `sampling`.
            seed: The seed, 0 to 2**64 - 1. The same seed gives the same tokens on every backend.
                None takes a random seed.
            stop: A string or strings that end the text. They are not part of it. The spelling of a
                control token, such as "<|user|>", ends the text at that token.
            ignore_eos: Whether to continue after end tokens, except those that `stop` names.
            system, raw, tools, documents, chat_template_kwargs: Arguments of `encode`. The message
                that the generation returns has the calls of tools.
            tool_choice: "auto" or None lets the model decide, "none" keeps the tools from it, and
                "required" forces a call. {"type": "function", "function": {"name": ...}} forces a
                call of this tool.
            parallel_tool_calls: Whether the answer may have several calls.
            processors: Logits processors in the order in which they run: objects, or
                `NAME=ARGUMENT` as on the command line.
            rope_factors: "auto", or "long" to begin with LongRoPE's long factors.
            logprobs: Number of alternatives, 0 to 20, whose log probabilities each piece tells in
                its `logprobs`, beside the one of its own token. The text stays the same. None tells
                none.
            speculation: Whether tokens of this answer may be guessed and checked, if the model was
                loaded with `speculation`. The text stays the same.
            prediction: A text, or its tokens, that the answer is thought to resemble, such as a
                program that is to be changed. Where the answer repeats it, it comes faster, if the
                model was loaded with `speculation`. The text stays the same.
            json_schema: A JSON schema that the answer follows: a dictionary, JSON text, or a class
                (a Pydantic model, a dataclass, a TypedDict). True asks for any JSON object. The
                JSON has no white space between its parts.
            regex: A regular expression that the whole answer matches.
            grammar: A grammar that the answer follows, in the form of Lark or of GBNF.
        Raises:
            ArgumentError: If a value is outside of its range.
            ContextError: If the prompt leaves no room in the context.
        """
        engine = self.engine
        if isinstance(prompt, Request):
            if options:
                raise ArgumentError("a request has its own options", parameter=min(options))
            request = prompt
        else:
            request = self.request(prompt, **options)
        sequence = engine.add(request)
        # After a control token the answer is a new text, and the space that some tokenizers put
        # before every text is dropped. Otherwise the answer continues the prompt's text, and a
        # space at its start is kept.
        is_new = self.tokenizer.is_control(request.prompt_ids[-1])
        is_constrained = any(isinstance(p, AllowedTokens) for p in request.processors)
        strips, tools = is_new and not is_constrained, request.tools
        stream = self.tokenizer.stream(
            strip_space=None if strips else False,
            shown=() if tools is None else tools.format.markers,
        )
        pieces = Pieces(stream, StopStrings(request.stop), request.ends)
        return Generation(engine, sequence, pieces, self._observers)

    def generate_many(
        self, requests: Iterable[Request], *, ordered: bool = False
    ) -> Iterator[Answer]:
        """Generate the answers to many requests, several at a time.

        Each text is the one that `generate` gives for the request alone. Requests are taken one by
        one as others end. A request that is refused or fails stops no other: its answer has the
        error.

        Args:
            requests: The requests; `request` makes them.
            ordered: Whether the answers come in the order of the requests. If False, each comes
                when it is complete.
        """
        answers = iter(Answers(self.generate, self.engine, requests))
        return in_order(answers) if ordered else answers

    def _processor(self, processor: LogitsProcessor | str) -> LogitsProcessor:
        if isinstance(processor, LogitsProcessor):
            return processor
        if not isinstance(processor, str):
            expected = "a LogitsProcessor or NAME=ARGUMENT"
            raise ArgumentError(parameter="processor", expected=expected, got=processor)
        name, _, argument = processor.partition("=")
        if name not in self._processors:
            known = ", ".join(self._processors)
            expected = f"one of {known}"
            raise ArgumentError(parameter="processor", expected=expected, got=name)
        made = self._processors[name](argument, self)
        if not isinstance(made, LogitsProcessor):
            raise PhicoreError(f"processor {name!r}: made {made!r:.60}, expected a LogitsProcessor")
        return made

    def save_session(
        self, path: str | os.PathLike[str], generation: Generation | Sequence[int]
    ) -> int:
        """Save what an ended generation has read and written, for another process.

        Args:
            path: The file. An older one is replaced.
            generation: The generation, or the tokens of the text.
        Returns:
            The number of tokens that were saved. It is 0, and nothing is written, if the prefix
            cache does not have the text.
        Raises:
            SessionError: If the cache cannot be saved.
        """
        if isinstance(generation, Generation):
            generation = generation.token_ids
        tokens = list(generation)
        return self.engine.save_session(Path(path), tokens, self._fingerprint)

    def load_session(self, path: str | os.PathLike[str]) -> list[int]:
        """Load a session, so that a prompt that begins with its text is read faster.

        Returns:
            The tokens of its text.
        Raises:
            SessionError: If the file is damaged, or was saved for another model, cache type or
                backend.
        """
        return list(self.engine.load_session(Path(path), self._fingerprint))

    @property
    def grammar_vocabulary(self) -> Vocabulary:
        """Return the tokens as constraints need them."""
        return self._requests.grammar_vocabulary

    @property
    def engine(self) -> Engine:
        """Return the engine, which runs the network. `phicore.lab` uses its internals.

        Raises:
            PhicoreError: If the model is closed.
        """
        if self._engine is None:
            raise PhicoreError("the model is closed; load it again")
        return self._engine

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Compute the scores of the next token after each token: (T, V) float32.

        Raises:
            ArgumentError: If there is no token, or a token is outside of the vocabulary.
            ContextError: If there are more tokens than the context holds.
            PhicoreError: If a score is not a finite number.
        """
        return self.engine.logits(checked_ids(token_ids, self.vocab_size))

    def score(
        self, token_ids: Sequence[int] | np.ndarray, logprobs: int = 0
    ) -> list[TokenLogprobs | None]:
        """Compute the log probability of each token of a text, given the tokens before it.

        Args:
            token_ids: The tokens.
            logprobs: Number of alternatives, 0 to 20, whose log probabilities are told, too.
        Returns:
            One result for each token. The first is None, since nothing comes before it.
        Raises:
            ArgumentError: If there is no token, a token is outside of the vocabulary, or the number
                of alternatives is not allowed.
            ContextError: If there are more tokens than the context holds.
            PhicoreError: If a score is not a finite number.
        """
        return self.engine.score(checked_ids(token_ids, self.vocab_size), logprobs)

    @property
    def fingerprint(self) -> str:
        """Return a text that changes when the bits of the results may change.

        It depends on the file, the versions of phicore and of the libraries, the backend and its
        options, and the machine.
        """
        names = ("phicore", "numpy", "jax", "jaxlib", "llvmlite", "mlx", "torch")
        versions = {d.name: d.version for d in distributions() if d.name in names}
        options = replace(self._ops.options, packed_cache=True)  # the bits do not depend on it
        parts = (self._fingerprint, sorted(versions.items()), self.backend, options)
        found = repr((*parts, platform.machine(), cpu_name(), cpu_count()))
        return hashlib.sha256(found.encode()).hexdigest()[:32]

    @property
    def device(self) -> str:
        """Return the name of the backend's device."""
        return self._ops.capabilities.device

    @property
    def load_s(self) -> float:
        """Return the time that loading took, in seconds; the time so far if it goes on."""
        if self._engine is not None:
            ready_s = max(self._engine.runner.weights.ready_s, self._made_s)
            self._load_s = ready_s - self._started_s
        return self._load_s

    def wait_until_loaded(self) -> None:
        """Wait for the weights. Whatever needs them does so by itself.

        Raises:
            PhicoreError: If they cannot be loaded.
        """
        _ = self.engine.runner.params

    def peak_memory_bytes(self) -> int | None:
        """Return the peak memory of the process or the device so far in bytes, None if unknown."""
        return self._ops.peak_memory_bytes()

    def close(self) -> None:
        """Release the weights. They stay in memory as long as a `Generation` still uses them."""
        self._load_s = self.load_s
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.team.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
