"""Tools, calls and results of a conversation in the form that a chat template reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from phicore.errors import TokenizerError
from phicore.text.messages import Message, text_of
from phicore.tools.choices import Tool
from phicore.tools.formats import CallFormat, History

_ASK = """You may call one or more of these functions to answer, if they help. They are described \
as JSON, one a line:
{tools}

To call a function, write its name and its arguments as JSON between these tags:
{begin}{around}{{"name": "...", "{key}": {{...}}}}{around}{end}
The results come between <tool_response> and </tool_response>. If no function helps, answer with \
plain text."""
"""What a model reads whose template knows no tools."""

Messages = list[dict[str, Any]]


def checked_history(messages: Sequence[Message]) -> Messages:
    """Return messages whose calls have their arguments as objects.

    A result gets the name of its function from the call with its `tool_call_id`, since some
    templates read it.

    Raises:
        TokenizerError: If a call is malformed, or its arguments are not the text of a JSON object.
    """
    found: Messages = []
    names: dict[Any, Any] = {}
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            expected = "expected text for 'role' and 'content'"
            raise TokenizerError(f"messages[{index}]: {expected}, found {message!r:.80}")
        turn = dict(message)
        if (calls := turn.get("tool_calls")) is not None:
            where = f"messages[{index}].tool_calls"
            if not isinstance(calls, (list, tuple)):
                raise TokenizerError(f"{where}: expected a list, found {calls!r:.60}")
            checked = [_checked_call(call, f"{where}[{n}]") for n, call in enumerate(calls)]
            names |= {call.get("id"): function_of(call).get("name") for call in checked}
            turn["tool_calls"] = checked or None
        id = turn.get("tool_call_id")
        if turn.get("role") == "tool" and turn.get("name") is None and isinstance(id, str):
            turn["name"] = names.get(id)
        found.append(turn)
    return found


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise TokenizerError(f"{where}: expected an object, found {call!r:.60}")
    inner, inside = call, where
    if "function" in call:
        inner, inside = call["function"], f"{where}.function"
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise TokenizerError(f"{inside}.name: expected the function's name")
    if call.get("type") not in (None, "function"):
        raise TokenizerError(f"{where}.type: expected function, found {call['type']!r:.60}")
    if not isinstance(call.get("id"), (str, type(None))):
        raise TokenizerError(f"{where}.id: expected a text, found {call['id']!r:.60}")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{inside}.arguments: not JSON: {error}") from error
    if not isinstance(arguments, (Mapping, type(None))):
        raise TokenizerError(f"{inside}.arguments: expected a JSON object, found {arguments!r:.60}")
    changed = {**inner, "arguments": arguments or {}}
    return {**call, "function": changed} if "function" in call else changed


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the name and the arguments of a call, whether or not they are in `function`."""
    inner = call.get("function", call)
    assert isinstance(inner, Mapping)
    return inner


def has_calls(messages: Sequence[Message]) -> bool:
    """Return whether a message has calls."""
    return any(isinstance(m, Mapping) and m.get("tool_calls") for m in messages)


def with_written_arguments(messages: Sequence[Message]) -> Messages:
    """Return messages whose calls have their arguments as text, as few templates want them."""

    def written(call: Mapping[str, Any]) -> dict[str, Any]:
        inner = function_of(call)
        changed = {**inner, "arguments": _dumped(inner.get("arguments"))}
        return {**call, "function": changed} if "function" in call else changed

    return [
        {**turn, "tool_calls": [written(call) for call in turn["tool_calls"]]}
        if turn.get("tool_calls")
        else dict(turn)
        for turn in messages
    ]


def shows_objects_of_python(messages: Sequence[Message], prompt: str) -> bool:
    """Return whether a prompt has arguments as Python prints them, and not as JSON."""
    shown = [
        repr(function_of(call)["arguments"])
        for turn in messages
        for call in turn.get("tool_calls") or []
    ]
    return any(each in prompt for each in shown if each != "{}")


def arranged(
    messages: Sequence[Message], tools: Sequence[Tool], format: CallFormat
) -> tuple[Messages, list[dict[str, Any]] | None]:
    """Return messages, and the variable `tools` of the chat template.

    Args:
        messages: The messages, which `checked_history` has checked.
        tools: The tools that the model is told of.
        format: The form of the calls, which tells how the prompt gets them.
    """
    turns = [dict(turn) for turn in messages]
    if format.history is History.TEMPLATE:
        wrapped = [{"type": "function", "function": tool.function} for tool in tools]
        return turns, wrapped or None
    turns = [_calls_as_text(turn, format) for turn in turns]
    if format.history is History.PHI_4:
        turns = [{**t, "role": "tool_response"} if t.get("role") == "tool" else t for t in turns]
        if tools:
            listed = _dumped([tool.function for tool in tools])
            turns = _with_system(turns, tools=listed)
    else:
        turns = _results_as_text(turns)
        if tools:
            shown = {name: getattr(format, name) for name in ("begin", "around", "key", "end")}
            lines = "\n".join(_dumped(tool.function) for tool in tools)
            turns = _with_system(turns, text=_ASK.format(tools=lines, **shown))
    return turns, None


def _with_system(turns: Messages, text: str = "", **keys: Any) -> Messages:
    """Return messages whose system message has another text at its end, and other keys."""
    first, others = {"role": "system", "content": ""}, turns
    if turns and turns[0].get("role") in ("system", "developer"):
        first, others = turns[0], turns[1:]
    joined = "\n\n".join(part for part in (text_of(first), text) if part)
    return [{**first, "content": joined, **keys}, *others]


def _calls_as_text(turn: dict[str, Any], format: CallFormat) -> dict[str, Any]:
    """Return a message with its calls in its text, as the model has written them."""
    if turn.get("role") != "assistant" or not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        inner = function_of(call)
        calls.append(_dumped({"name": inner["name"], format.key: inner["arguments"]}))
    if format.is_list:
        calls = [f"[{', '.join(calls)}]"]
    written = [f"{format.begin}{format.around}{c}{format.around}{format.end}" for c in calls]
    text = text_of(turn)
    content = "\n".join([text, *written] if text else written)
    return {**{k: v for k, v in turn.items() if k != "tool_calls"}, "content": content}


def _results_as_text(turns: Messages) -> Messages:
    """Return messages whose results are texts of the user; consecutive ones are joined."""
    found: Messages = []
    is_result = False
    for turn in turns:
        if turn.get("role") not in ("tool", "function"):
            found.append(turn)
            is_result = False
            continue
        text = f"<tool_response>\n{text_of(turn)}\n</tool_response>"
        if is_result:
            found[-1]["content"] += f"\n{text}"
        else:
            found.append({"role": "user", "content": text})
        is_result = True
    return found


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenizerError(f"messages: expected data of JSON's types: {error}") from error
