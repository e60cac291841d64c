"""Grammars of answers that call functions: the model's own form around the schemas."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from phicore.errors import ArgumentError
from phicore.grammar.constraints import (
    ANY_OBJECT,
    Constraint,
    check_text,
    in_a_line,
    matcher_class,
    schema_text,
)
from phicore.grammar.vocabulary import Vocabulary
from phicore.tools.choices import TOOLS, Tool, ToolUse

MOST_CALLS = 16
"""The largest number of calls in an answer: a small model would call for ever."""
_SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON with the white space of Python's `json.dumps`, with which chat templates write calls."""


def constrained(
    use: ToolUse, vocabulary: Vocabulary, control_id: Callable[[str], int | None]
) -> tuple[ToolUse, Constraint]:
    """Make the constraint of an answer that calls tools, or may call them.

    Where no call is forced, a schema that cannot be honoured is left out, unless the tool is
    strict: its arguments are then any object.

    Args:
        use: What the answer may call.
        vocabulary: The model's tokens.
        control_id: Returns the control token with a spelling, None if there is none.
    Returns:
        The use, which is constrained now, and the constraint.
    Raises:
        ArgumentError: If a schema that must be honoured cannot be.
    """
    tools = [(tool, use.is_forced or tool.is_strict) for tool in use.tools]
    texts = [_schema(tool, is_needed) for tool, is_needed in tools]
    check_text("".join(texts), TOOLS)  # before the library takes its time for each of them
    pairs = zip(texts, tools, strict=True)
    lark = _lark(use, [_honoured(text, *pair, vocabulary) for text, pair in pairs], control_id)
    check_text(lark, TOOLS)
    grammar: str = matcher_class().grammar_from_lark(lark)
    return replace(use, is_constrained=True), Constraint(TOOLS, grammar)


def _schema(tool: Tool, is_needed: bool) -> str:
    """Return the schema of a tool's arguments as text, or that of any object."""
    try:
        return schema_text(tool.parameters, TOOLS)
    except ArgumentError as error:
        if is_needed:
            raise _wrong(tool, error.problem) from error
        return json.dumps(ANY_OBJECT)


def _honoured(text: str, tool: Tool, is_needed: bool, vocabulary: Vocabulary) -> Mapping[str, Any]:
    """Return the schema of a tool's arguments if the library can follow it, or any object's."""
    try:
        grammar = matcher_class().grammar_from_json_schema(text, overrides=_SPACED)
        vocabulary.check(Constraint(TOOLS, grammar))
    except (ValueError, ArgumentError) as error:
        if not is_needed:
            return ANY_OBJECT
        problem = error.problem if isinstance(error, ArgumentError) else str(error)
        raise _wrong(tool, problem) from error
    schema: Mapping[str, Any] = json.loads(text)
    return schema


def _wrong(tool: Tool, problem: str) -> ArgumentError:
    return ArgumentError(f"{tool.where}.parameters: {in_a_line(problem)}", parameter=TOOLS)


def _lark(
    use: ToolUse, schemas: list[Mapping[str, Any]], control_id: Callable[[str], int | None]
) -> str:
    """Return the grammar in the form of Lark, with the extensions of llguidance."""
    format = use.format
    begin, end = (_marker(marker, control_id) for marker in (format.begin, format.end))
    around = _quoted(format.around)
    rules = []
    for number, (tool, schema) in enumerate(zip(use.tools, schemas, strict=True)):
        opening = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{format.key}": '
        inner = json.dumps({**schema, "x-guidance": _SPACED})
        rules.append(f"call_{number}: {_quoted(opening)} arguments_{number} {_quoted('}')}")
        rules.append(f"arguments_{number}: %json {inner}")
    names = " | ".join(f"call_{number}" for number in range(len(schemas)))
    rules.append(f"call: {names}")
    more = f"{{0,{MOST_CALLS - 1}}}"
    # What comes after the first marker: one call, or several.
    if format.is_list:
        calls = '"[" call "]"' if use.is_single else f'"[" call (", " call){more} "]"'
        rules.append(f"calls: {around} {calls} {around} {end}")
    elif use.is_single:
        rules.append(f"calls: {around} call {around} {end}")
    else:
        rules.append(f'calls: one ("\\n" {begin} one){more}')
        rules.append(f"one: {around} call {around} {end}")
    if use.is_forced:
        rules.insert(0, "start: calls" if format.is_bare else f"start: {begin} calls")
        return "\n".join(rules)
    text = r"/\s*([^\s{](.|\n)*)?/" if format.is_bare else r"/(.|\n)*/"
    bare = " | calls" if format.is_bare else ""
    if begin.startswith("<["):
        start = [f"start: TEXT | TEXT {begin} calls{bare}", f"TEXT: {text}"]
    else:  # the text ends where a marker is complete for the first time
        start = [
            f"start: TEXT | head calls{bare}",
            f"head[lazy]: {text} {begin}",
            f"TEXT: {text}",
        ]
    return "\n".join([*start, *rules])


def _marker(text: str, control_id: Callable[[str], int | None]) -> str:
    """Return a marker as a control token if it is one, otherwise as text."""
    id = control_id(text) if text else None
    return _quoted(text) if id is None else f"<[{id}]>"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
