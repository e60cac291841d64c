"""Prompts as tokens and as text: messages in the model's chat template, and raw texts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from phicore.errors import ArgumentError, TokenizerError, about
from phicore.prompting.arguments import (
    check_template_kwargs,
    checked_ids,
    refuse_without_template,
)
from phicore.text.chat_template import ChatTemplate
from phicore.text.messages import Message, with_texts
from phicore.text.tokenizer import Tokenizer
from phicore.tools import CallFormat, format_of
from phicore.tools.choices import checked_tools
from phicore.tools.history import (
    arranged,
    checked_history,
    has_calls,
    shows_objects_of_python,
    with_written_arguments,
)

log = logging.getLogger(__name__)

Prompt = str | Sequence[Message] | Sequence[int] | np.ndarray


class Prompts:
    """Makes the prompts of a model.

    Attributes:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, metadata: Mapping[str, Any], name: str) -> None:
        """Prepare to make prompts.

        Args:
            metadata: All key-value pairs of the model's file.
            name: The name of the file, for errors.
        """
        self.tokenizer = tokenizer
        self._metadata = metadata
        self._name = name

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Return the template that turns messages into a prompt."""
        with about(self._name):
            return ChatTemplate.from_gguf(self._metadata, self.tokenizer)

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
        """Turn a prompt into tokens; see `Model.encode`."""
        check_template_kwargs(chat_template_kwargs)
        for_template = {"tools": tools, "documents": documents, **(chat_template_kwargs or {})}
        if isinstance(prompt, str):
            if raw:
                if system is not None:
                    raise ArgumentError("a raw prompt has no system message", parameter="system")
                refuse_without_template(for_template)
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
            with about(self._name):
                return self._encoded(messages, **for_template)
        refuse_without_template(for_template)
        return checked_ids(prompt, self.tokenizer.vocab_size)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of the prompt that messages make; see `Model.render`."""
        check_template_kwargs(chat_template_kwargs)
        with about(self._name):
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

    def _rendered(self, *args: Any, is_escaped: bool) -> str:
        try:
            return self._rendered_if_flat(*args, is_escaped=is_escaped)
        except RecursionError as error:
            raise TokenizerError("messages, tools: nested too deeply") from error

    def _rendered_if_flat(
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
