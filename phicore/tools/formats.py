"""The forms in which models write calls of functions, and how a chat template tells the form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum


class History(Enum):
    """How a prompt gets the tools, the calls and the results of a conversation."""

    TEMPLATE = "the template reads the variable `tools`, `tool_calls` and messages of the role tool"
    PHI_4 = "the template reads the key `tools` of the system message, and knows no calls"
    TEXT = "the template knows no tools, so all of them are text of ordinary messages"


@dataclass(frozen=True)
class CallFormat:
    """The form in which a model writes calls.

    Attributes:
        name: The name, for errors and logs.
        begin: The marker before a call, or before the list of calls.
        end: The marker after it; empty if there is none.
        around: White space between the markers and the JSON.
        key: The key of the arguments, beside the key "name".
        is_list: Whether the JSON is a list of calls.
        is_bare: Whether a call without a marker may be the whole answer.
        has_many: Whether an answer may have several calls.
        history: How a prompt gets tools, calls and results.
    """

    name: str
    begin: str
    end: str = ""
    around: str = ""
    key: str = "arguments"
    is_list: bool = False
    is_bare: bool = False
    has_many: bool = True
    history: History = History.TEMPLATE

    @property
    def markers(self) -> tuple[str, ...]:
        """Return the markers. They may be control tokens, which are otherwise not printed."""
        return (self.begin, self.end) if self.end else (self.begin,)


HERMES = CallFormat("Hermes", "<tool_call>", "</tool_call>", around="\n")
"""A JSON object between `<tool_call>` and `</tool_call>`: Hermes 2 Pro, Qwen2.5, Qwen3."""
PHI_4 = CallFormat("Phi-4-mini", "<|tool_call|>", "<|/tool_call|>", is_list=True)
"""`<|tool_call|>[{"name": ..., "arguments": {...}}, ...]<|/tool_call|>`."""
LLAMA_3 = CallFormat("Llama 3", "<|python_tag|>", key="parameters", is_bare=True, has_many=False)
"""`{"name": ..., "parameters": {...}}` as the whole answer, or after `<|python_tag|>`."""
GENERIC = replace(HERMES, name="generic", history=History.TEXT)
"""For templates that know no tools, or a form that is none of the above."""

_KNOWN: tuple[tuple[tuple[str, ...], CallFormat], ...] = (
    (("<|tool|>", "['tools']"), replace(PHI_4, history=History.PHI_4)),
    (("<|tool|>", "message.tools"), replace(PHI_4, history=History.PHI_4)),
    (("<|tool_call|>", "tools"), PHI_4),
    (("<tool_call>", "tools"), HERMES),
    (("<|python_tag|>", "tools", '"parameters": '), LLAMA_3),
    (('{"name": function name, "parameters"', "tools"), LLAMA_3),
)
"""Texts that a template of a form has. The first form whose texts are all there is taken."""


def format_of(template: str) -> CallFormat:
    """Return the form of the calls of a model.

    Args:
        template: The source of the chat template for conversations with tools.
    """
    for texts, found in _KNOWN:
        if all(text in template for text in texts):
            return found
    return GENERIC
