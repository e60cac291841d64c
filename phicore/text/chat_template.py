"""Chat templates, which turn messages into the prompt format that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phicore.errors import TokenizerError
from phicore.text.tokenizer import Tokenizer
from phicore.text.tokenizer_keys import special_token_id

Message = Mapping[str, Any]
"""A message of a chat, with the keys "role" ("system", "user", "assistant" or another), "content"
(a text), and other keys that the template reads, such as `tool_calls`."""

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
_PROBE = "phicoremessageprobe"  # letters alone, which escaping leaves; case may change
# The keys in which programs pass the reasoning of a message. Templates read the first or second.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A model's Jinja template. It runs in a sandbox, since files are not trusted.

    Templates can use the names and features that `transformers` provides: `messages`, `tools`,
    `documents`, `add_generation_prompt`, `bos_token` and other special tokens, `raise_exception`,
    `strftime_now`, `tojson`, loop controls and `{% generation %}` blocks.

    Some templates refuse a system message, or silently drop it, like the one in Phi-3's GGUF files.
    The text of the system message is then put in front of the first user message, with a blank line
    between them. If a template drops content that is a list of parts ({"type": "text", "text":
    ...}), or writes it as Python would print the list, the parts are joined to one string. If it
    still drops the user's text, `render` raises.
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
            TokenizerError: If a message or the template is malformed, or if the template refuses
                the messages or drops the user's text.
        """
        turns = _checked(messages)
        given = {
            "tools": None if tools is None else _plain(tools),
            "documents": None if documents is None else _plain(documents),
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
            **_plain(variables),
        }

        def rendered(turns: list[dict[str, Any]]) -> str:
            try:
                template = self._template if tools is None else self._tools_template
                return template.render(messages=turns, **given)
            except Exception as error:  # a template is a program, so it can fail in any way
                raise TokenizerError(f"chat template: {' '.join(str(error).split())}") from error

        if not _reads_parts(rendered, turns):
            turns = [turn | {"content": _text(turn)} for turn in turns]
        if not _shows(rendered, turns, "system"):
            turns = _without_system(turns)
        prompt = rendered(turns)
        if not _shows(rendered, turns, "user", default=True):
            raise TokenizerError(
                "chat template: it leaves out the user's message; use --raw to send the prompt as "
                "it is"
            )
        return prompt

    @cached_property
    def _template(self) -> jinja2.Template:
        return _environment().from_string(self.source)

    @cached_property
    def _tools_template(self) -> jinja2.Template:
        return _environment().from_string(self._tool_use)


def _source(metadata: Mapping[str, Any], key: str) -> str | None:
    """Return the template under a key, or None if there is none or it is blank."""
    source = metadata.get(key)
    if source is not None and not isinstance(source, str):
        found = " ".join(repr(source).split())  # numpy writes an array in several lines
        raise TokenizerError(f"{key}: expected text, found {found:.80}")
    return source if source and source.strip() else None


def _shows(
    rendered: Callable[[list[dict[str, Any]]], str],
    turns: list[dict[str, Any]],
    role: str,
    default: bool = False,
) -> bool:
    """Return whether the template shows the text of every message of a role in the prompt.

    This renders a distinctive text in place of each such message, and looks for it in the prompt.

    Args:
        default: The result if the template fails with that text.
    """
    asked = [turn["role"] == role and _has_text(turn) for turn in turns]
    if not any(asked):
        return True
    probes = [
        _probed(turn) if is_asked else turn for turn, is_asked in zip(turns, asked, strict=True)
    ]
    try:
        return rendered(probes).lower().count(_PROBE) >= sum(asked)
    except TokenizerError:
        return default


def _reads_parts(
    rendered: Callable[[list[dict[str, Any]]], str], turns: list[dict[str, Any]]
) -> bool:
    """Return whether the template can read the messages whose content is a list of parts.

    A template that was written for strings either fails or shows the list as Python prints it.
    """
    asked = [isinstance(turn.get("content"), list) and _has_text(turn) for turn in turns]
    if not any(asked):
        return True
    probes = [
        _probed(turn) if is_asked else turn for turn, is_asked in zip(turns, asked, strict=True)
    ]
    try:
        prompt = rendered(probes).lower()
    except TokenizerError:
        return False
    return prompt.count(_PROBE) >= sum(asked) and f"'text': '{_PROBE}'" not in prompt


def _has_text(turn: Mapping[str, Any]) -> bool:
    content = turn.get("content")
    if isinstance(content, list):
        return any(isinstance(part, dict) and part.get("text") for part in content)
    return bool(content)


def _probed(turn: dict[str, Any]) -> dict[str, Any]:
    """Replace a message's text, or its first part that has text, by the distinctive text."""
    content: Any = _PROBE
    if isinstance(turn["content"], list):
        content = list(turn["content"])
        number = next(i for i, p in enumerate(content) if isinstance(p, dict) and p.get("text"))
        content[number] = content[number] | {"text": _PROBE}
    return turn | {"content": content}


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Check messages and convert them to plain data, in the form that `transformers` passes.

    Keys whose value is None are dropped. Reasoning is stored under each key that templates read.

    Raises:
        TokenizerError: If there is no message, or a message is malformed.
    """
    if not messages:
        raise TokenizerError("messages: expected at least one, found none")
    turns = []
    for index, message in enumerate(messages):
        expected = f"messages[{index}]: expected"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TokenizerError(f"{expected} text for 'role' and 'content', found {message!r:.80}")
        turn = {str(key): _plain(value) for key, value in message.items() if value is not None}
        content = turn.get("content", "")
        if not isinstance(content, (str, list)) or (content == "" and set(turn) == {"role"}):
            raise TokenizerError(f"{expected} text for 'role' and 'content', found {message!r:.80}")
        for name in _REASONING:
            if name in turn:
                turn = {"thinking": turn[name], **turn, "reasoning_content": turn[name]}
                break
        turns.append(turn)
    return turns


def _without_system(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Move the text of system messages in front of the first user message."""
    system = "\n\n".join(_text(turn) for turn in turns if turn["role"] == "system" and _text(turn))
    others = [turn for turn in turns if turn["role"] != "system"]
    if not system:
        return others
    for index, turn in enumerate(others):
        if turn["role"] == "user":
            if isinstance(turn.get("content"), list):
                part = {"type": "text", "text": f"{system}\n\n"}
                others[index] = turn | {"content": [part, *turn["content"]]}
            else:
                others[index] = turn | {"content": f"{system}\n\n{_text(turn)}"}
            return others
    return [{"role": "user", "content": system}, *others]


def _text(turn: Mapping[str, Any]) -> str:
    content = turn.get("content", "")
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


def _plain(value: Any) -> Any:
    """Convert data to JSON's types, so that a template gets no objects with methods of their own.

    Raises:
        TokenizerError: If the data has a value of another type.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    for kind in (bool, str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    raise TokenizerError(f"messages: expected data of JSON's types, found {value!r:.80}")


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


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["dict"] = _Dict()
    return environment


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
