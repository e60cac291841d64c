"""How a conversation is written: as JSON that people can read, and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from phicore.chat.conversation import Conversation, Turn
from phicore.errors import ConversationError

VERSION = 1
_KEY = "phicore_chat"
_INHERITED = ("system", "dropped", "options", "model", "backend")
"""The fields of a turn that its entry in the file lacks if the turn before has the same value."""
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "int": int,
    "str": str,
    "int | None": (int, type(None)),
    "str | None": (str, type(None)),
    "Mapping[str, Any]": dict,
    "dict[str, Any]": dict,
}


def to_json(conversation: Conversation) -> str:
    """Return a conversation as JSON."""
    by_number = {turn.number: asdict(turn) for turn in conversation.turns}
    turns = []
    for values in by_number.values():
        before = by_number.get(values["parent"], {})
        turns.append(
            {n: v for n, v in values.items() if n not in _INHERITED or before.get(n, MISSING) != v}
        )
    said = {
        _KEY: VERSION,
        "title": conversation.title,
        "created": conversation.created,
        "system": conversation.system,
        "settings": conversation.settings,
        "current": conversation.current,
        "dropped": conversation.dropped,
        "turns": turns,
    }
    return json.dumps(said, ensure_ascii=False, indent=1) + "\n"


def from_json(text: str, name: str) -> Conversation:
    """Read a conversation.

    Raises:
        ConversationError: If the text is no conversation, or damaged. The message has no file name.
    """
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"damaged: {error}") from None
    if not isinstance(said, dict) or _KEY not in said:
        raise ConversationError("not a conversation of phicore chat")
    if said[_KEY] != VERSION:
        raise ConversationError(
            f"expected a conversation of version {VERSION}, found {said[_KEY]!r:.20}"
        )
    conversation = Conversation(name)
    for each in ("system", "settings", "dropped", "created"):
        setattr(conversation, each, _checked(Conversation, each, said.get(each)))
    entries = said.get("turns")
    if not isinstance(entries, list):
        raise ConversationError("damaged: expected a list of turns")
    by_number: dict[int, Turn] = {}
    for entry in entries:
        turn = _turn(entry, by_number)
        by_number[turn.number] = turn
    conversation.turns = sorted(by_number.values(), key=lambda turn: turn.number)
    current = said.get("current")
    if current is not None and current not in by_number:
        raise ConversationError(f"damaged: there is no turn {current!r:.20}")
    conversation.go(current)
    return conversation


def _turn(entry: Any, by_number: Mapping[int, Turn]) -> Turn:
    if not isinstance(entry, dict):
        raise ConversationError(f"damaged: expected a turn, found {entry!r:.40}")
    parent = entry.get("parent")
    if parent is not None and parent not in by_number:
        raise ConversationError(f"damaged: there is no turn {parent!r:.20}")
    before = {} if parent is None else {n: getattr(by_number[parent], n) for n in _INHERITED}
    values = {}
    for each in fields(Turn):
        value = entry.get(each.name, before.get(each.name, MISSING))
        if value is not MISSING:
            values[each.name] = _checked(Turn, each.name, value)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ConversationError(f"damaged: a turn lacks {each.name!r}")
    turn = Turn(**values)
    if turn.number in by_number:
        raise ConversationError(f"damaged: there are two turns {turn.number}")
    return turn


def _checked(kind: type, name: str, value: Any) -> Any:
    """Check the type of a field's value."""
    (field,) = (each for each in fields(kind) if each.name == name)
    is_good = isinstance(value, _TYPES[str(field.type)]) and not isinstance(value, bool)
    if not is_good or (isinstance(value, int) and value < 0):
        raise ConversationError(f"damaged: {name}: expected {field.type}, found {value!r:.40}")
    return value


def to_messages(conversation: Conversation) -> str:
    """Return the messages of a conversation as JSON, in the form of OpenAI's API."""
    turns = conversation.path(conversation.current)
    found = [] if conversation.system is None else [_message("system", conversation.system)]
    for turn in turns:
        found += [_message("user", turn.user), _message("assistant", turn.answer)]
    return json.dumps({"messages": found}, ensure_ascii=False, indent=1) + "\n"


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def to_markdown(conversation: Conversation) -> str:
    """Return a conversation as Markdown, with the way that the model sees."""
    parts = [f"# {conversation.title or 'Conversation'}"]
    if conversation.system:
        parts.append(f"**System:** {conversation.system}")
    for turn in conversation.path(conversation.current):
        parts.append(f"## User\n\n{turn.user}")
        parts.append(f"## Assistant\n\n{turn.answer}")
        parts.append(f"<!-- {turn.model}, {turn.backend}, seed {turn.seed}, {turn.created} -->")
    return "\n\n".join(parts) + "\n"
