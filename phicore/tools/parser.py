"""Finds calls of functions in an answer, while its text comes piece by piece."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from phicore.text.stop_strings import overlap
from phicore.tools.formats import CallFormat

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""How a call begins, up to its arguments."""


@dataclass(frozen=True)
class Text:
    """Text of the answer that is no call."""

    text: str


@dataclass(frozen=True)
class Begin:
    """The beginning of a call."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """A part of the arguments of the call that began last: a part of a JSON object's text."""

    text: str


Event = Text | Begin | Arguments


class CallParser:
    """Divides an answer into text and calls.

    White space around calls is no text of the answer. Nothing else is lost: what looks like a call
    but is no JSON of the right form, or calls an unknown function, is text. The calls and the
    joined text do not depend on how the answer is divided into pieces.

    A call is told when it is complete. An eager parser tells its arguments while they come; it is
    for answers in which a grammar lets nothing but a call follow the beginning of one. If such an
    answer is cut, the arguments are cut, too.

    Args:
        format: The form of the calls.
        names: The names of the functions that may be called.
        is_eager: Whether the parser is eager.
    """

    def __init__(
        self, format: CallFormat, names: Collection[str], *, is_eager: bool = False
    ) -> None:
        self._format = format
        self._names = names
        self._is_eager = is_eager
        self._left = ""  # what was pushed and is not told
        self._opening: str | None = None  # in a call: white space and the marker before `_left`
        self._scan = _Scan()
        self._is_in_arguments = self._is_behind_arguments = False
        self._is_start = True  # nothing but white space has come
        self._after_call = False

    def push(self, text: str) -> list[Event]:
        """Take the next piece of the answer, and return what is certain by now."""
        self._left += text
        return self._run(is_end=False)

    def flush(self) -> list[Event]:
        """Return the rest, since no more text follows."""
        return self._run(is_end=True)

    def _run(self, is_end: bool) -> list[Event]:
        events: list[Event] = []
        before = None
        # Each step takes something from `_left` or changes the state, or waits for more text.
        while (state := self._state) != before:
            before = state
            if self._is_in_arguments:
                self._take_arguments(events)
            elif self._is_behind_arguments:
                self._close(events, is_end)
            elif self._opening is None:
                self._take_text(events, is_end)
            else:
                self._take_call(events, is_end)
        return events

    @property
    def _state(self) -> tuple[Any, ...]:
        return self._left, self._opening, self._is_in_arguments, self._is_behind_arguments

    # ---- text ------------------------------------------------------------------------------

    def _take_text(self, events: list[Event], is_end: bool) -> None:
        text, format = self._left, self._format
        if format.is_bare and self._is_start and text.lstrip().startswith("{"):
            self._enter(text[: len(text) - len(text.lstrip())], text.lstrip())
            return
        at = text.find(format.begin)
        if at >= 0:
            told = text[:at].rstrip()
            self._tell(events, told)
            self._enter(text[len(told) : at] + format.begin, text[at + len(format.begin) :])
            return
        held = 0 if is_end else overlap(text, format.begin)
        told = text[: len(text) - held]
        if not is_end or (self._after_call and not told.strip()):
            told = told.rstrip()  # perhaps a call follows, or one came before
        self._left = "" if is_end else text[len(told) :]
        self._tell(events, told)

    def _tell(self, events: list[Event], text: str) -> None:
        if text:
            events.append(Text(text))
            self._is_start = self._after_call = False

    def _enter(self, opening: str, left: str) -> None:
        self._opening, self._left, self._scan = opening, left, _Scan()

    # ---- calls -----------------------------------------------------------------------------

    def _take_call(self, events: list[Event], is_end: bool) -> None:
        if self._is_eager and self._begin_eagerly(events):
            return
        found = self._scan.end_in(self._left)
        if found is None and not is_end:
            return
        calls = None if found is None or found == 0 else self._calls(self._left[:found].strip())
        if calls is None or found is None:
            self._give_back(events)
            return
        left = self._after_end(self._left[found:], is_end)
        if left is None:
            return
        for name, arguments in calls:
            events += [Begin(name), Arguments(arguments)]
        self._leave(left)

    def _give_back(self, events: list[Event]) -> None:
        """Tell the beginning of what is no call as text; what comes after it is looked at anew."""
        opening, self._opening = self._opening or "", None
        if not opening.strip():  # a bare object: all of it is text
            opening += self._left[:1]
            self._left = self._left[1:]
        self._tell(events, opening)

    def _after_end(self, text: str, is_end: bool) -> str | None:
        """Return what comes after the end marker, which may lack; None if that is not certain."""
        end, stripped = self._format.end, text.lstrip()
        if end and stripped.startswith(end):
            return stripped[len(end) :]
        if end and end.startswith(stripped) and not is_end:
            return None
        return text

    def _leave(self, left: str) -> None:
        self._left, self._opening = left, None
        self._is_start = False
        self._after_call = True

    def _calls(self, text: str) -> list[tuple[str, str]] | None:
        """Return the names and the arguments of the calls in JSON, None if it has something else.

        Args:
            text: An object or a list, with nothing around it.
        """
        try:
            is_list = text.startswith("[")
            parts = _elements(text) if is_list else [(json.loads(text, strict=False), text)]
        except (ValueError, RecursionError):
            return None
        calls = [_call(value, part) for value, part in parts]
        found = [call for call in calls if call is not None and call[0] in self._names]
        return found if found and len(found) == len(calls) else None

    # ---- calls that a grammar has made, told while they come ---------------------------------

    def _begin_eagerly(self, events: list[Event]) -> bool:
        text = self._left.lstrip()
        listed = text[1:] if text.startswith("[") else text
        head = _HEAD.match(listed)
        if head is None or (name := json.loads(head[1])) not in self._names:
            return False
        self._left, self._scan, self._is_in_arguments = listed[head.end() :], _Scan(), True
        self._is_start = False
        events.append(Begin(name))
        return True

    def _take_arguments(self, events: list[Event]) -> None:
        end = self._scan.end_in(self._left)
        told = self._left if end is None else self._left[:end]
        if told:
            events.append(Arguments(told))
        self._left = self._left[len(told) :]
        self._scan.at = 0
        if end is not None:
            self._is_in_arguments, self._is_behind_arguments = False, True

    def _close(self, events: list[Event], is_end: bool) -> None:
        """Take what comes after the arguments: the object's end, and another call or the end."""
        text = self._left.lstrip()
        if not text.startswith("}"):
            return  # the answer was cut, so no more follows
        text = text[1:]
        if self._format.is_list:
            text = text.lstrip()
            if text.startswith(","):
                self._is_behind_arguments = False
                self._enter(",", text[1:])
                return
            if not text.startswith("]"):
                if is_end:
                    self._is_behind_arguments = False
                    self._leave("")
                return
            text = text[1:]
        left = self._after_end(text, is_end)
        if left is not None:
            self._is_behind_arguments = False
            self._leave(left)


class _Scan:
    """Finds the end of a JSON object or list in a text that grows.

    Attributes:
        at: The number of characters that were looked at.
    """

    def __init__(self) -> None:
        self.at = 0
        self._depth = 0
        self._end: int | None = None
        self._is_text = self._is_escape = False

    def end_in(self, text: str) -> int | None:
        """Return the length of the text up to the end; None if the end has not come.

        It is 0 if no object or list begins here, white space aside.
        """
        if self._end is not None:
            return self._end
        for at in range(self.at, len(text)):
            character = text[at]
            if self._is_escape:
                self._is_escape = False
            elif self._is_text:
                self._is_escape = character == "\\"
                self._is_text = character != '"'
            elif character == '"' and self._depth:
                self._is_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]" and self._depth:
                self._depth -= 1
                if not self._depth:
                    self._end = at + 1
                    return self._end
            elif not self._depth and not character.isspace():
                self._end = 0
                return 0
        self.at = len(text)
        return None


def _elements(text: str) -> list[tuple[Any, str]]:
    """Return the values in the text of a list, each with its own text.

    Raises:
        ValueError: If the text is not JSON.
    """
    decoder, at = json.JSONDecoder(strict=False), 1
    found = []
    while True:
        at += len(text[at:]) - len(text[at:].lstrip())
        value, end = decoder.raw_decode(text, at)
        found.append((value, text[at:end]))
        rest = text[end:].lstrip()
        at = len(text) - len(rest) + 1
        if rest == "]":
            return found
        if not rest.startswith(","):
            raise ValueError("expected a comma")


def _call(value: Any, text: str) -> tuple[str, str] | None:
    """Return the name and the arguments of a call, None if the value is none.

    Args:
        value: The value.
        text: Its text, from which the arguments are taken as they are if they are JSON.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # the text of an object, as some models write
        try:
            arguments = json.loads(arguments, strict=False)
        except (ValueError, RecursionError):
            return None
    elif head := _HEAD.match(text):
        end = _Scan().end_in(text[head.end() :])
        given = text[head.end() :][:end]
        if _is_json(given) and json.loads(given) == arguments:
            return value["name"], given
    if not isinstance(arguments, dict):
        return None
    return value["name"], json.dumps(arguments, ensure_ascii=False)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:  # a line break in a text, which `strict=False` allows
        return False
    return True


def message_of(events: Iterable[Event]) -> dict[str, Any]:
    """Return the assistant's message that events make, with role, content and perhaps tool_calls.

    The content is None if there is no text but a call. Each call has an identifier of its own.
    """
    content = ""
    calls: list[dict[str, Any]] = []
    for event in events:
        match event:
            case Text():
                content += event.text
            case Begin():
                function = {"name": event.name, "arguments": ""}
                calls.append({"id": new_call_id(), "type": "function", "function": function})
            case Arguments():
                calls[-1]["function"]["arguments"] += event.text
    if not calls:
        return {"role": "assistant", "content": content}
    return {"role": "assistant", "content": content or None, "tool_calls": calls}


def new_call_id() -> str:
    """Return a new identifier of a call."""
    return f"call_{secrets.token_hex(12)}"
