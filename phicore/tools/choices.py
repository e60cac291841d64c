"""The tools of a request, and which of them the answer may or must call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phicore.errors import ArgumentError
from phicore.tools.formats import CallFormat
from phicore.tools.parser import CallParser

TOOLS, TOOL_CHOICE = "tools", "tool_choice"
MOST_TOOLS = 512
"""The largest number of tools of a request. A grammar of calls takes a millisecond for each."""
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: Its name.
        given: The function as it was given: name, description and perhaps more.
        parameters: The JSON schema of its arguments, which are an object.
        is_strict: Whether arguments must follow the schema, also where a call is not forced.
        where: Where the tool is in the list, for errors.
    """

    name: str
    given: Mapping[str, Any]
    parameters: Mapping[str, Any]
    is_strict: bool
    where: str

    @property
    def function(self) -> dict[str, Any]:
        """Return the tool as prompts show it: an object with name, description and parameters."""
        told = {k: v for k, v in self.given.items() if k != "strict" and v is not None}
        return {**told, "parameters": dict(self.parameters)}


@dataclass(frozen=True)
class ToolUse:
    """What an answer may call.

    Attributes:
        format: The form of the calls.
        tools: The tools that may be called.
        is_forced: Whether the answer must call one.
        is_single: Whether it may have one call at most.
        is_constrained: Whether a grammar makes calls follow the form from their beginning.
    """

    format: CallFormat
    tools: tuple[Tool, ...]
    is_forced: bool = False
    is_single: bool = False
    is_constrained: bool = False

    @property
    def needs_grammar(self) -> bool:
        """Return whether the request asks for what only a grammar can promise."""
        is_strict = any(tool.is_strict for tool in self.tools)
        return self.is_forced or is_strict or (self.is_single and self.format.has_many)

    def parser(self, *, is_eager: bool = False) -> CallParser:
        """Return a parser for one answer.

        Args:
            is_eager: Whether the arguments of a call are told while they come. It has an effect
                only where a grammar has made sure that a call that begins is one.
        """
        names = frozenset(tool.name for tool in self.tools)
        return CallParser(self.format, names, is_eager=is_eager and self.is_constrained)


def tool_use(
    format: CallFormat, tools: Sequence[Tool], choice: Any = None, *, is_parallel: bool = True
) -> ToolUse | None:
    """Return what an answer may call; None if it may call nothing.

    Args:
        format: The form of the calls.
        tools: The tools.
        choice: "auto" or None (the model decides), "none", "required" (at least one call), the
            name of a tool as {"type": "function", "function": {"name": ...}}, or OpenAI's
            "allowed_tools".
        is_parallel: Whether an answer may have several calls.
    Raises:
        ArgumentError: If the choice is none of these, or names no tool.
    """
    expected = 'none, auto, required or {"type": "function", "function": {"name": ...}}'
    is_forced, chosen, is_single = choice == "required", tuple(tools), not is_parallel
    if isinstance(choice, Mapping):
        kind, inner = choice.get("type"), choice.get(str(choice.get("type")))
        if kind == "function" and isinstance(inner, Mapping):
            is_forced, is_single = True, True
            chosen = _named(tools, [inner.get("name")])
        elif kind == "allowed_tools" and isinstance(inner, Mapping):
            names, mode = inner.get("tools"), inner.get("mode", "auto")
            if not isinstance(names, list) or not names or mode not in ("auto", "required"):
                raise ArgumentError(parameter=TOOL_CHOICE, expected=expected, got=choice)
            is_forced = mode == "required"
            chosen = _named(tools, map(_name_in, names))
        else:
            raise ArgumentError(parameter=TOOL_CHOICE, expected=expected, got=choice)
    elif choice not in (None, "none", "auto", "required"):
        raise ArgumentError(parameter=TOOL_CHOICE, expected=expected, got=choice)
    if choice == "none" or (not tools and not is_forced):
        return None
    if not tools:
        raise ArgumentError("there are no tools to call", parameter=TOOL_CHOICE)
    return ToolUse(format, chosen, is_forced, is_single or not format.has_many)


def _name_in(value: Any) -> Any:
    inner = value.get("function") if isinstance(value, Mapping) else None
    return inner.get("name") if isinstance(inner, Mapping) else None


def _named(tools: Sequence[Tool], names: Iterable[Any]) -> tuple[Tool, ...]:
    """Return the tools with these names, each once."""
    known, found = {tool.name: tool for tool in tools}, {}
    for name in names:
        if not isinstance(name, str) or name not in known:
            listed = ", ".join(known) or "no tools"
            problem = f"{name!r:.80} is not among the tools ({listed:.400})"
            raise ArgumentError(problem, parameter=TOOL_CHOICE)
        found[name] = known[name]
    return tuple(found.values())


def checked_tools(tools: Any) -> list[Tool]:
    """Return tools from the form of OpenAI's API.

    Args:
        tools: A list of {"type": "function", "function": {"name", "description", "parameters",
            "strict"}}, or of the inner objects alone. None is an empty list.
    Raises:
        ArgumentError: If a tool is of another form, two have the same name, or there are too many.
    """
    if tools is None:
        return []
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence):
        raise ArgumentError(parameter=TOOLS, expected="a list of tools", got=tools)
    if len(tools) > MOST_TOOLS:
        raise ArgumentError(
            f"expected at most {MOST_TOOLS} tools, got {len(tools)}", parameter=TOOLS
        )
    found = [_tool(tool, f"[{index}]") for index, tool in enumerate(tools)]
    names = [tool.name for tool in found]
    for tool in found:
        if names.count(tool.name) > 1:
            raise ArgumentError(f"{tool.name!r:.80} is there twice", parameter=TOOLS)
    return found


def _tool(value: Any, where: str) -> Tool:
    if not isinstance(value, Mapping):
        raise _wrong(f"{where}: expected an object with type and function")
    if value.get("type", "function") != "function" and "function" in value:
        raise _wrong(f"{where}.type: expected function")
    inner, inside = value, where
    if "function" in value:
        inner, inside = value["function"], f"{where}.function"
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise _wrong(f"{inside}.name: expected the function's name")
    if not inner["name"]:
        raise _wrong(f"{inside}.name: expected at least one character")
    description, parameters = inner.get("description"), inner.get("parameters")
    if description is not None and not isinstance(description, str):
        raise _wrong(f"{inside}.description: expected a text")
    if parameters is None or parameters == {}:
        parameters = _NO_ARGUMENTS
    if not isinstance(parameters, Mapping):
        raise _wrong(f"{inside}.parameters: expected a JSON schema")
    parameters = {"type": "object", **parameters}
    if parameters["type"] != "object":
        raise _wrong(f"{inside}.parameters.type: expected object, since arguments have names")
    strict = inner.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise _wrong(f"{inside}.strict: expected true or false")
    return Tool(inner["name"], inner, parameters, bool(strict), inside)


def _wrong(problem: str) -> ArgumentError:
    return ArgumentError(problem, parameter=TOOLS)
