"""Chat templates, which turn messages into the prompt format that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phicore.errors import TokenizerError
from phicore.text.vocabulary import PHI

Message = Mapping[str, str]
"""A message of a chat, with the keys "role" ("system", "user" or "assistant") and "content"."""

# The format of every Phi-3 model, as in llama.cpp. The tokenizer puts BOS in front.
PHI3_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_PHI3_PIECES = {"<|user|>", "<|assistant|>", "<|end|>"}
_NO_TEMPLATE = "{{ raise_exception('the model has none; use --raw to send the prompt as it is') }}"
_PROBE = "phicore-system-message-probe"


class ChatTemplate:
    """A model's Jinja template. It runs in a sandbox, since files are not trusted.

    Templates can use the names that `transformers` provides: `messages`, `add_generation_prompt`,
    `bos_token`, `eos_token`, `tools` and `documents` (None), `raise_exception`, `strftime_now` and
    `tojson`.

    Some templates refuse a system message, or silently drop it, like the one in Phi-3's GGUF files.
    The text of the system message is then put in front of the first user message, with a blank line
    between them.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        """Store the template. The first `render` compiles it, so a bad template fails only there.

        Args:
            source: The Jinja source.
            bos_token: The spelling of the token that begins a text.
            eos_token: The spelling of the token that ends a text.
        """
        self.source = source
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ChatTemplate:
        """Return the template of a GGUF file, or Phi-3's if a Phi-3 model has no template.

        Without any template, the result is one whose `render` raises.

        Raises:
            TokenizerError: If the template or the vocabulary is not text.
        """
        pieces = metadata.get("tokenizer.ggml.tokens", [])
        if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
            raise TokenizerError("tokenizer.ggml.tokens: expected an array of strings")
        source = metadata.get("tokenizer.chat_template")
        if source is None:
            phi3 = str(metadata.get("general.architecture")) in PHI and not pieces
            source = PHI3_TEMPLATE if phi3 or _PHI3_PIECES.issubset(pieces) else _NO_TEMPLATE
        if not isinstance(source, str):
            found = " ".join(repr(source).split())  # numpy writes an array in several lines
            raise TokenizerError(f"tokenizer.chat_template: expected text, found {found:.80}")

        def spelling(name: str) -> str:
            id = metadata.get(f"tokenizer.ggml.{name}_token_id")
            return pieces[id] if isinstance(id, int) and 0 <= id < len(pieces) else ""

        return cls(source, bos_token=spelling("bos"), eos_token=spelling("eos"))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Turn messages into a prompt.

        Args:
            messages: The messages, the oldest first; at least one.
            add_generation_prompt: Whether the prompt ends where the assistant's answer begins.
        Raises:
            TokenizerError: If a message or the template is malformed, or if the template refuses
                the messages.
        """
        turns = _checked(messages)
        if not self._shows_system(turns, add_generation_prompt):
            turns = _without_system(turns)
        return self._render(turns, add_generation_prompt)

    def _shows_system(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> bool:
        """Return whether the template shows every system message in the prompt.

        This renders a distinctive text in place of each system message and looks for it in the
        prompt. If the template fails, the result is False: rendering without a system message then
        works, or raises the reason.
        """
        probes = [t | {"content": _PROBE} if t["role"] == "system" else t for t in turns]
        wanted = sum(turn["role"] == "system" for turn in turns)
        if not wanted:
            return True
        try:
            return self._render(probes, add_generation_prompt).count(_PROBE) >= wanted
        except TokenizerError:
            return False

    def _render(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=turns,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
        except Exception as error:  # a template is a program, so it can fail in any way
            raise TokenizerError(f"chat template: {' '.join(str(error).split())}") from error

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        return environment.from_string(self.source)


def _checked(messages: Sequence[Message]) -> list[dict[str, str]]:
    if not messages:
        raise TokenizerError("messages: expected at least one, found none")
    for index, message in enumerate(messages):
        parts = (
            [message.get(k) for k in ("role", "content")] if isinstance(message, Mapping) else []
        )
        if not parts or not all(isinstance(part, str) for part in parts):
            raise TokenizerError(
                f"messages[{index}]: expected text for 'role' and 'content', found {message!r:.80}"
            )
    return [dict(message) for message in messages]


def _without_system(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """Move the text of system messages in front of the first user message."""
    system = "\n\n".join(t["content"] for t in turns if t["role"] == "system" and t["content"])
    others = [turn for turn in turns if turn["role"] != "system"]
    if not system:
        return others
    for index, turn in enumerate(others):
        if turn["role"] == "user":
            others[index] = turn | {"content": f"{system}\n\n{turn['content']}"}
            return others
    return [{"role": "user", "content": system}, *others]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Convert a value to JSON as in `transformers`. Jinja's own filter would escape <, > and &."""
    return json.dumps(
        value, ensure_ascii=options.pop("ensure_ascii", False), indent=indent, **options
    )
