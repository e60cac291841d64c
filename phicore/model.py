"""The Python API: `load` a model, then `generate` text or compute `logits`."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from phicore.backend import Backend, BackendOptions
from phicore.backend.host import cpu_count, cpu_name, free_memory_bytes, memory_bytes
from phicore.engine import Engine, Request
from phicore.engine.drafts import Drafter, NGrams
from phicore.engine.forced import Forced
from phicore.engine.request import ROPE_FACTORS, is_integer
from phicore.engine.scheduler import MAX_SEQUENCES, SIZES, Scheduler
from phicore.errors import ArgumentError, GGUFError, PhicoreError, TokenizerError, about
from phicore.generation import Answer, Answers, Generation, in_order
from phicore.gguf.reader import open_gguf
from phicore.grammar import AllowedTokens, Constraint, Vocabulary, constrained, constraint_of
from phicore.network.architectures import BUILT_IN, Architecture, architecture_of
from phicore.network.config import Phi3Config
from phicore.network.processors import LogitsProcessor
from phicore.network.sampling import Sampling, recommended
from phicore.network.weights import read_config
from phicore.plugins import Plugins, choose_backend
from phicore.plugins.observers import Observers
from phicore.progress import Progress, silent
from phicore.sources import ModelFiles, default_reference, resolve
from phicore.sources.hub import fetch_tokenizer
from phicore.text.chat_template import ChatTemplate
from phicore.text.logprobs import TokenLogprobs
from phicore.text.messages import Message, with_texts
from phicore.text.pieces import Pieces
from phicore.text.stop_strings import StopStrings, checked_stops
from phicore.text.tokenizer import Tokenizer
from phicore.text.tokenizer_keys import origin
from phicore.tools import CallFormat, Tool, ToolUse, format_of, tool_use
from phicore.tools.choices import checked_tools
from phicore.tools.formats import GENERIC
from phicore.tools.history import (
    arranged,
    checked_history,
    has_calls,
    shows_objects_of_python,
    with_written_arguments,
)

log = logging.getLogger(__name__)

SPECULATION = False
"""Whether tokens are guessed by default."""
PREFIX_CACHE_BYTES = 2 * 10**9
"""The largest size of the prefix cache by default."""

Prompt = str | Sequence[Message] | Sequence[int] | np.ndarray


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
        load_s: The time that loading took, in seconds.
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
    ) -> None:
        started = time.perf_counter()
        self.reference = files.reference
        self.path = files.path
        self.backend = backend
        name, others = files.path.name, () if files.tokenizer is None else (str(files.tokenizer),)
        with open_gguf(files.path) as file, about(name, *others):
            self.metadata = file.metadata
            architecture = architecture_of(self.metadata, architectures, tensors=file.tensors)
            self.config = read_config(file, architecture)
            self.vocab_size = self.config.vocab_size
            self._fingerprint = file.fingerprint()
            self.context = _checked_context(context, self.config)
            self.tokenizer = tokenizer_of(files, self.metadata)
            if self.tokenizer.vocab_size != self.vocab_size:
                raise GGUFError(
                    f"{file.path.name}: tensor 'token_embd.weight' has {self.vocab_size} rows, "
                    f"the tokenizer {self.tokenizer.vocab_size} tokens"
                )
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
                prefix_bytes=_checked_prefix_bytes(prefix_cache_bytes),
                kv_bytes=_checked_kv_memory(kv_memory, ops),
                drafter=_checked_drafter(speculation),
            )
            if kv_memory is not None:
                self._engine.fit_context()
                self.context = self._engine.context
        self._ops = ops
        self._observers = observers
        self._processors = processors or {}
        self.load_s = time.perf_counter() - started

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Return the template that turns messages into a prompt."""
        with about(self.path.name):
            return ChatTemplate.from_gguf(self.metadata, self.tokenizer)

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
        _check_template_kwargs(chat_template_kwargs)
        for_template = {"tools": tools, "documents": documents, **(chat_template_kwargs or {})}
        if isinstance(prompt, str):
            if raw:
                if system is not None:
                    raise ArgumentError("a raw prompt has no system message", parameter="system")
                _refuse_without_template(for_template)
                return self.tokenizer.encode(prompt)
            if found := self.tokenizer.control_tokens_in(prompt):
                piece = self.tokenizer.piece(found[0])
                log.warning("%r is text in a message, and a token in a raw prompt only", piece)
            prompt = [{"role": "user", "content": prompt}]
            if system is not None:
                prompt = [{"role": "system", "content": system}, *prompt]
        elif system is not None or raw:
            raise ArgumentError("system, raw: only for a prompt that is a string")
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            messages: Sequence[Message] = prompt  # type: ignore[assignment]
            with about(self.path.name):
                return self._encoded(messages, **for_template)
        _refuse_without_template(for_template)
        return _checked_ids(prompt, self.vocab_size)

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
        _check_template_kwargs(chat_template_kwargs)
        with about(self.path.name):
            return self._rendered(
                messages, tools, documents, chat_template_kwargs or {}, is_escaped=False
            )

    def _encoded(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        **for_template: Any,
    ) -> list[int]:
        """Turn messages into tokens. Control tokens come from the template and the assistant only.

        The other messages and the documents may be by anyone, and cannot add a turn of the chat.
        """
        prompt = self._rendered(messages, tools, documents, for_template, is_escaped=True)
        return self.tokenizer.encode(prompt, escaped=True)

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        for_template: Mapping[str, Any],
        *,
        is_escaped: bool,
    ) -> str:
        escape: Callable[[str], str] = self.tokenizer.escape if is_escaped else str
        turns, listed = arranged(checked_history(messages), checked_tools(tools), self.call_format)
        variables = {
            "tools": with_texts(listed, escape),
            "documents": with_texts(documents, escape),
            **for_template,
        }

        def rendered(turns: Sequence[Message]) -> tuple[Sequence[Message], str]:
            shown = [self._escaped(message) if is_escaped else message for message in turns]
            return shown, self.chat_template.render(shown, **variables)

        # Most templates write arguments as JSON themselves; some want them as text.
        try:
            shown, prompt = rendered(turns)
            is_written = not has_calls(turns) or not shows_objects_of_python(shown, prompt)
        except TokenizerError:
            if not has_calls(turns):
                raise
            is_written = False
        return prompt if is_written else rendered(with_written_arguments(turns))[1]

    @cached_property
    def call_format(self) -> CallFormat:
        """Return the form in which the model writes calls, which its chat template tells."""
        return format_of(self.chat_template.tool_use)

    def _escaped(self, message: Message) -> Any:
        """Return a message whose control tokens are text, unless it is the assistant's."""
        if not isinstance(message, Mapping):
            return message  # the chat template says what is wrong with it
        if message.get("role") == "assistant":
            return with_texts(message, self.tokenizer.escape_marks)
        content, escape = message.get("content"), self.tokenizer.escape
        found = with_texts(message, escape)
        if isinstance(content, (list, tuple)):
            given = [part.get("text") if isinstance(part, Mapping) else None for part in content]
            texts = self.tokenizer.escape_parts([t if isinstance(t, str) else "" for t in given])
            found["content"] = [
                {**part, "text": text} if isinstance(part, Mapping) and text else part
                for part, text in zip(found["content"], texts, strict=True)
            ]
        return found

    def request(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        system: str | None = None,
        raw: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool = True,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processors: Sequence[LogitsProcessor | str] = (),
        rope_factors: str = ROPE_FACTORS[0],
        logprobs: int | None = None,
        speculation: bool = True,
        json_schema: Any = None,
        regex: str | None = None,
        grammar: str | None = None,
        **sampling: Any,
    ) -> Request:
        """Make a request from the arguments of `generate`, and check it."""
        known = {field.name for field in fields(Sampling)}
        if unknown := sampling.keys() - known:
            raise ArgumentError(
                f"unknown parameter; the parameters of the sampler are {', '.join(sorted(known))}",
                parameter=min(unknown),
            )
        if isinstance(processors, str) or not isinstance(processors, Sequence):
            raise ArgumentError(parameter="processors", expected="a list", got=processors)
        chosen = {name: value for name, value in sampling.items() if value is not None}
        ends = frozenset() if ignore_eos else self.tokenizer.end_token_ids
        all_processors = [self._processor(p) for p in processors]
        constraint = constraint_of(json_schema=json_schema, regex=regex, grammar=grammar)
        use = self._tool_use(checked_tools(tools), tool_choice, parallel_tool_calls)
        if use is not None:
            if constraint is not None:
                raise ArgumentError("not together with tools", parameter=constraint.name)
            use, constraint = self._constrained(use, ignore_eos)
        if constraint is not None:
            if ignore_eos:
                raise ArgumentError("not together with ignore_eos", parameter=constraint.name)
            all_processors.append(AllowedTokens(self._grammar_vocabulary, constraint))
        return Request(
            self.encode(
                prompt,
                system=system,
                raw=raw,
                tools=None if use is None else tools,
                documents=documents,
                chat_template_kwargs=chat_template_kwargs,
            ),
            replace(self.sampling, **chosen),
            max_tokens=max_tokens,
            seed=seed,
            ends=ends | self._stop_tokens(checked_stops(stop)),
            stop=stop,
            processors=all_processors,
            rope_factors=rope_factors,
            logprobs=logprobs,
            tools=use,
            speculation=speculation,
        )

    def _tool_use(self, tools: Sequence[Tool], choice: Any, is_parallel: Any) -> ToolUse | None:
        """Return what an answer may call, None if it may call nothing."""
        if not isinstance(is_parallel, bool):
            parameter = "parallel_tool_calls"
            raise ArgumentError(parameter=parameter, expected="True or False", got=is_parallel)
        if not tools:  # the template is not asked, since it may be malformed
            return tool_use(GENERIC, tools, choice)
        return tool_use(self.call_format, tools, choice, is_parallel=is_parallel)

    def _constrained(self, use: ToolUse, ignore_eos: bool) -> tuple[ToolUse, Constraint | None]:
        """Constrain the calls of an answer, if the library is there or the request needs it."""
        is_there = find_spec("llguidance") is not None
        if not use.needs_grammar:
            if ignore_eos or not is_there or not self.tokenizer.end_token_ids:
                return use, None
        elif not is_there:
            problem = "forced and strict calls need llguidance; install phicore[grammar]"
            raise ArgumentError(problem, parameter="tools")
        return constrained(use, self._grammar_vocabulary, self.tokenizer.control_id)

    @cached_property
    def _grammar_vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer)

    def _stop_tokens(self, stops: Sequence[str]) -> frozenset[int]:
        """Return the control tokens among the stop strings: they are no text, but end it too.

        Raises:
            ArgumentError: If a stop string has a control token and text, which no text can match.
        """
        found = set()
        for stop in stops:
            for id in self.tokenizer.control_tokens_in(stop):
                piece = self.tokenizer.piece(id)
                if stop.rstrip() != piece:  # the token comes before white space
                    raise ArgumentError(
                        f"{stop!r:.40} has the control token {piece!r} in it, which is no text; "
                        f"give {piece!r} alone",
                        parameter="stop",
                    )
                found.add(id)
        return frozenset(found)

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
        return self.engine.logits(_checked_ids(token_ids, self.vocab_size))

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
        return self.engine.score(_checked_ids(token_ids, self.vocab_size), logprobs)

    @property
    def fingerprint(self) -> str:
        """Return a text that changes when the bits of the results may change.

        It depends on the file, the versions of phicore and of the libraries, the backend and its
        options, and the machine.
        """
        names = ("phicore", "numpy", "jax", "jaxlib", "llvmlite", "mlx", "torch")
        versions = {d.name: d.version for d in distributions() if d.name in names}
        parts = (self._fingerprint, sorted(versions.items()), self.backend, self._ops.options)
        found = repr((*parts, platform.machine(), cpu_name(), cpu_count()))
        return hashlib.sha256(found.encode()).hexdigest()[:32]

    @property
    def device(self) -> str:
        """Return the name of the backend's device."""
        return self._ops.capabilities.device

    def peak_memory_bytes(self) -> int | None:
        """Return the peak memory of the process or the device so far in bytes, None if unknown."""
        return self._ops.peak_memory_bytes()

    def close(self) -> None:
        """Release the weights. They stay in memory as long as a `Generation` still uses them."""
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
    *,
    ctx: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    max_sequences: int = MAX_SEQUENCES,
    prefix_cache_bytes: int | None = None,
    kv_memory: int | None = None,
    speculation: bool | Drafter = SPECULATION,
    **options: Any,
) -> Model:
    """Load a model.

    Args:
        ref: A path, `hf:owner/repo[:Q4_K_M]`, `package:NAME`, a short name such as `phi-3-mini`, or
            None for the default model.
        backend: The name of an installed backend. None takes the preferred one that works here.
        ctx: The largest number of tokens that a prompt and its answer may have together. None takes
            the context that the model was made for.
        tokenizer: A tokenizer.json to use instead of the model's own.
        progress: Called with (what, done, total) while weights are loaded, steps are compiled and
            prompts are read.
        max_sequences: The largest number of generations that are computed together; others wait.
        prefix_cache_bytes: The largest number of bytes in which the model remembers what ended
            generations have read, for prompts that begin the same way, such as the next turn of a
            conversation. None takes an eighth of the machine's memory, at most 2 GB; 0 remembers
            nothing.
        kv_memory: The largest number of bytes of all keys and values together. Generations that do
            not fit wait, and the context is what fits. None takes half of the memory that is free
            on a CPU, and sets no limit on other devices.
        speculation: Whether tokens are guessed from what prompt and answer have in common and from
            what a constraint forces, and checked several at a time. The text stays the same, and
            comes faster where it repeats itself or the prompt, or follows a schema. A
            `phicore.engine.drafts.Drafter` guesses in its own way.
        options: The fields of `BackendOptions`: `device`, `devices`, `cache_type`, `dtype`,
            `fast_prefill`, `compact`, `threads`.
    Raises:
        PhicoreError: If the model cannot be loaded. The error is of a subclass, and its one line
            says what is wrong and what to do.
    """
    known = {field.name for field in fields(BackendOptions)}
    if unknown := options.keys() - known:
        raise ArgumentError(
            f"unknown parameter; the options of a backend are {', '.join(sorted(known))}",
            parameter=min(unknown),
        )
    chosen = BackendOptions(**options)
    if not is_integer(max_sequences) or not 1 <= max_sequences <= SIZES[-1]:
        expected = f"1 to {SIZES[-1]}"
        raise ArgumentError(parameter="max_sequences", expected=expected, got=max_sequences)
    plugins = Plugins()
    info = choose_backend(backend, plugins) if backend is not None else None
    reference = default_reference()[0] if ref is None else os.fspath(ref)
    files = resolve(reference, tokenizer=tokenizer, schemes=plugins.sources())
    info = info or choose_backend(None, plugins)  # imports the libraries it tries
    return Model(
        files,
        info.create(chosen),
        backend=info.name,
        context=ctx,
        progress=progress or silent,
        observers=plugins.observers(),
        architectures=plugins.architectures(),
        processors=plugins.logits_processors(),
        max_sequences=max_sequences,
        prefix_cache_bytes=prefix_cache_bytes,
        kv_memory=kv_memory,
        speculation=speculation,
    )


def _check_template_kwargs(variables: Mapping[str, Any] | None) -> None:
    parameter = "chat_template_kwargs"
    if variables is None:
        return
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise ArgumentError(parameter=parameter, expected="variables by name", got=variables)
    if "messages" in variables:
        raise ArgumentError("messages are the prompt", parameter=parameter)
    if "self" in variables:
        raise ArgumentError("'self' is a name of Jinja's own", parameter=parameter)


def tokenizer_of(files: ModelFiles, metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a model.

    Where the file's own cannot be used, a model from the Hub gets the tokenizer.json of the
    repository that it was made from, if the file names one.
    """
    try:
        return Tokenizer.of(files.tokenizer, metadata, explicit=files.tokenizer_is_given)
    except TokenizerError as own:
        repo = re.fullmatch(r"https://huggingface\.co/([\w.-]+/[\w.-]+?)/?", origin(metadata) or "")
        if files.tokenizer_is_given or not files.is_from_hub or repo is None:
            raise
        path = fetch_tokenizer(repo.group(1))
        if path is None:
            raise
        try:
            return Tokenizer.from_file(path, metadata)
        except TokenizerError as error:
            raise TokenizerError(f"{own}; the one there is of no use: {error}") from error


def _checked_context(context: int | None, config: Phi3Config) -> int:
    most = config.max_position_embeddings
    if context is None:
        return most
    if not is_integer(context) or not 1 <= context <= most:
        raise ArgumentError(
            parameter="ctx", expected=f"1 to {most}, the model's context", got=context
        )
    return int(context)


def _checked_kv_memory(count: int | None, ops: Backend) -> int | None:
    if count is None:
        free = free_memory_bytes() if ops.capabilities.device == "cpu" else None
        return None if free is None else free // 2
    if not is_integer(count) or count < 1:
        raise ArgumentError(parameter="kv_memory", expected="1 or more bytes", got=count)
    return int(count)


def _checked_drafter(speculation: bool | Drafter) -> Drafter | None:
    if isinstance(speculation, Drafter):
        return speculation
    if not isinstance(speculation, bool):
        expected = "True, False or a Drafter"
        raise ArgumentError(parameter="speculation", expected=expected, got=speculation)
    return Forced(NGrams()) if speculation else None


def _checked_prefix_bytes(count: int | None) -> int:
    if count is None:
        memory = memory_bytes()
        return PREFIX_CACHE_BYTES if memory is None else min(PREFIX_CACHE_BYTES, memory // 8)
    if not is_integer(count) or count < 0:
        raise ArgumentError(parameter="prefix_cache_bytes", expected="0 or more", got=count)
    return int(count)


def _refuse_without_template(for_template: Mapping[str, Any]) -> None:
    given = [name for name, value in for_template.items() if value is not None]
    if given:
        raise ArgumentError("only for a prompt of messages", parameter=given[0])


def _checked_ids(ids: Any, vocab_size: int) -> list[int]:
    expected = "a string, messages or token ids"
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise ArgumentError(parameter="prompt", expected=expected, got=ids)
    checked = []
    for i in ids:
        if not is_integer(i):
            raise ArgumentError(
                f"expected {expected}; found {i!r} in the list", parameter="prompt", got=i
            )
        if not 0 <= i < vocab_size:
            raise ArgumentError(f"token id {i}: expected 0 to {vocab_size - 1}")
        checked.append(int(i))
    return checked
