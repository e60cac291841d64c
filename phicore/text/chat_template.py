"""Chat templates, which turn messages into the prompt format that a model was trained on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from phicore.errors import ArgumentError, TokenizerError
from phicore.text.messages import (
    Message,
    Turns,
    arrangements,
    lost_turns,
    plain,
    text_of,
)
from phicore.text.template_budget import Budget, refusal
from phicore.text.template_sandbox import BoundedEnvironment
from phicore.text.tokenizer import Tokenizer
from phicore.text.tokenizer_keys import special_token_id

log = logging.getLogger(__name__)

# The format of every model with Phi-3's vocabulary, as in llama.cpp. The tokenizer puts BOS in
# front.
PHI3_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_NO_TEMPLATE = "{{ raise_exception('the model has none; use --raw to send the prompt as it is') }}"
_KEY = "tokenizer.chat_template"


class ChatTemplate:
    """A model's Jinja template. It runs in a sandbox, since files are not trusted.

    `phicore.text.template_budget` says which bounds its time and its memory have.

    Templates can use the names and features that `transformers` provides: `messages`, `tools`,
    `documents`, `add_generation_prompt`, `bos_token` and other special tokens, `raise_exception`,
    `strftime_now`, `tojson`, loop controls and `{% generation %}` blocks.

    Templates differ in the messages that they read. Some refuse a system message, or drop it
    without a word, like the one in Phi-3's GGUF files; some read texts, and some lists of parts
    ({"type": "text", "text": ...}). `render` tries the forms of `phicore.text.messages` until a
    prompt has all texts. It raises if no prompt has the last user's text, and logs what else a
    template leaves out.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        tool_use: str | None = None,
        **special_tokens: str,
    ) -> None:
        """Store the template. The first `render` compiles it, so a bad template fails only there.

        Args:
            source: The Jinja source.
            bos_token: The spelling of the token that begins a text.
            eos_token: The spelling of the token that ends a text.
            tool_use: The Jinja source for chats with tools. None takes `source`.
            special_tokens: The spellings of other special tokens, such as `unk_token`.
        """
        self.source = source
        self._tool_use = source if tool_use is None else tool_use
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token, **special_tokens}
        self._known: dict[str, jinja2.Template | Exception] = {}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate:
        """Read the template of a GGUF file.

        If a file has no template, or a blank one, Phi-3's template is taken for Phi-3's vocabulary.
        For other vocabularies, the result is then a template whose `render` raises.

        Raises:
            TokenizerError: If the template is not text.
        """
        source = _source(metadata, _KEY) or _source(metadata, f"{_KEY}.default")
        if source is None:
            source = PHI3_TEMPLATE if tokenizer.is_phi3 else _NO_TEMPLATE
        ids = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
        for name, key in (("unk_token", "unknown"), ("pad_token", "padding")):
            # Few templates use these, so a chat does not fail because such an id is none.
            with suppress(TokenizerError):
                ids[name] = special_token_id(metadata, key, tokenizer.vocab_size)
        spellings = {name: tokenizer.piece(id) for name, id in ids.items() if id is not None}
        return cls(source, tool_use=_source(metadata, f"{_KEY}.tool_use"), **spellings)

    @property
    def tool_use(self) -> str:
        """Return the Jinja source for chats with tools."""
        return self._tool_use

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Turn messages into a prompt.

        Args:
            messages: The messages, the oldest first; at least one.
            tools: The JSON schemas of functions that the model may call.
            documents: Texts that the model may cite, each {"title": ..., "text": ...}.
            add_generation_prompt: Whether the prompt ends where the assistant's answer begins.
            variables: Other variables of the template, such as `enable_thinking`.
        Raises:
            ArgumentError: If the tools or the documents are no list of mappings.
            TokenizerError: If a message or the template is malformed, or if the template refuses
                the messages or drops the last user's text.
        """
        given = {
            "tools": _checked_list("tools", tools),
            "documents": _checked_list("documents", documents),
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
            **plain(variables),
        }
        budget = Budget()
        best = self._best(messages, given, budget)
        if lost := [best.turns[index]["role"] for index in best.lost]:
            log.warning("chat template: it leaves out messages: %s", ", ".join(lost))
        for name in ("tools", "documents"):
            if given[name] and not self._reads(name, best, given, budget):
                log.warning("chat template: it knows no %s, and leaves them out", name)
        return best.prompt

    def _best(
        self, messages: Sequence[Message], given: Mapping[str, Any], budget: Budget
    ) -> _Attempt:
        """Try the forms of the messages, and return the first prompt that leaves out the least."""
        attempts: list[_Attempt] = []
        for arrangement in arrangements(messages):
            errors = []
            for turns in arrangement:
                try:
                    prompt = self._rendered(turns, given, budget)
                except TokenizerError as error:
                    errors.append(error)
                    continue
                lost = lost_turns(turns, prompt, lambda turns: self._rendered(turns, given, budget))
                attempts.append(_Attempt(turns, prompt, lost))
                if not lost:
                    return attempts[-1]
        if not attempts:
            raise errors[0]
        best = min(attempts, key=lambda attempt: (attempt.loses_user, len(attempt.lost)))
        if best.loses_user:
            raise TokenizerError(
                "chat template: it leaves out the user's message; use --raw to send the prompt as "
                "it is"
            )
        return best

    def _reads(
        self, name: str, attempt: _Attempt, given: Mapping[str, Any], budget: Budget
    ) -> bool:
        """Return whether the prompt would be another one without a variable."""
        try:
            return self._rendered(attempt.turns, {**given, name: None}, budget) != attempt.prompt
        except TokenizerError:
            return True

    def _rendered(self, turns: Turns, given: Mapping[str, Any], budget: Budget) -> str:
        try:
            with budget.applied():
                template = self._compiled(self._tool_use if given["tools"] else self.source)
                return template.render(messages=turns, **given)
        except Exception as error:  # a template is a program, so it can fail in any way
            raise refusal(error) from error

    def _compiled(self, source: str) -> jinja2.Template:
        """Return a template. It is compiled once, also if that fails."""
        if source not in self._known:
            try:
                self._known[source] = _environment().from_string(source)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised each time
                self._known[source] = error
        found = self._known[source]
        if isinstance(found, Exception):
            raise found
        return found


def _source(metadata: Mapping[str, Any], key: str) -> str | None:
    """Return the template under a key, or None if there is none or it is blank."""
    source = metadata.get(key)
    if source is not None and not isinstance(source, str):
        found = " ".join(repr(source).split())  # numpy writes an array in several lines
        raise TokenizerError(f"{key}: expected text, found {found:.80}")
    return source if source and source.strip() else None


def _checked_list(name: str, values: Any) -> list[dict[str, Any]] | None:
    """Check tools or documents, and convert them to plain data."""
    if values is None:
        return None
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Sequence):
        raise ArgumentError(parameter=name, expected="a list of mappings", got=values)
    for value in values:
        if not isinstance(value, Mapping):
            raise ArgumentError(parameter=name, expected="mappings in the list", got=value)
    return plain(values)


@dataclass(frozen=True)
class _Attempt:
    """A form of the messages, the prompt made from it, and the turns that the prompt lacks."""

    turns: Turns
    prompt: str
    lost: list[int]

    @property
    def loses_user(self) -> bool:
        users = [i for i, turn in enumerate(self.turns) if turn["role"] == "user" and text_of(turn)]
        return bool(users) and users[-1] in self.lost


# ---- transformers' dialect of Jinja --------------------------------------------------------
# Source: `_compile_jinja_template` of transformers (utils/chat_template_utils.py).


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the assistant's text and renders it unchanged."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as a mutable class attribute

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """Provides `dict(...)` and `dict.fromkeys(...)`, without other attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.bound()
    return environment


def _strftime_now(format: str) -> str:
    if len(format) > 1000:
        raise jinja2.TemplateError("a format of more than 1000 characters for strftime_now")
    return datetime.now().strftime(format)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Convert a value to JSON as in `transformers`. Jinja's own filter would escape <, > and &."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
