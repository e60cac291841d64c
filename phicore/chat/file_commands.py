"""Commands about the files of conversations."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from phicore.chat import files
from phicore.chat.chat import Chat
from phicore.chat.replies import Reply, count_of, short
from phicore.disk.replacing import replacing
from phicore.errors import ArgumentError, ConversationError, PhicoreError


def clear(chat: Chat, argument: str) -> Reply:
    """Begin a new conversation."""
    old = chat.conversation
    chat.change_to(old.emptied())
    kept = f"; /load {old.name} goes back to the old one" if old.name else ""
    return Reply([f"a new conversation{kept}"])


def save(chat: Chat, argument: str) -> Reply:
    """Save the conversation, under a name if one is given, or write it to another file."""
    talk = chat.conversation
    if not talk.turns:
        raise ArgumentError("there is nothing to save yet")
    if argument.endswith((".md", ".json")):
        return _export(chat, Path(argument).expanduser())
    if chat.store is None:
        raise ArgumentError(
            "conversations are not kept with --no-history; name a file, such as /save chat.md"
        )
    if argument:
        chat.store.rename(talk, argument)
    chat.store.save(talk)
    return Reply([f"saved: {chat.store.path(talk.name)}"])


def _export(chat: Chat, path: Path) -> Reply:
    as_text = files.to_markdown if path.suffix == ".md" else files.to_messages
    if path.exists():
        raise ArgumentError(f"{path} exists already; take another name")
    try:
        with replacing(path) as new:
            new.write_text(as_text(chat.conversation), encoding="utf-8")
    except OSError as error:
        raise ConversationError(f"{path}: cannot be written: {error.strerror}") from None
    return Reply([f"saved: {path}"])


def load(chat: Chat, argument: str) -> Reply:
    """Go on with another conversation."""
    if chat.store is None:
        raise ArgumentError("conversations are not kept with --no-history")
    if not argument:
        raise ArgumentError("expected a name; /sessions lists them")
    names = chat.store.names()
    if argument.isdecimal() and argument not in names and 1 <= int(argument) <= len(names):
        argument = names[int(argument) - 1]
    chat.change_to(chat.store.load(argument))
    return Reply(resumed_lines(chat), turn=chat.conversation.last)


def resumed_lines(chat: Chat) -> list[str]:
    """Return lines that say which conversation goes on, and whether its last answer was lost."""
    talk = chat.conversation
    turns = count_of(len(talk.path(talk.current)), "turn")
    lines = [f"{talk.name}: {turns}, begun {talk.created[:10]}: {short(talk.title)}"]
    if talk.last is not None and talk.last.is_lost:
        lines.append("the program was ended before it answered the last message; /retry answers it")
    return lines


def sessions(chat: Chat, argument: str) -> Reply:
    """List the conversations; a damaged file is told in a line."""
    if chat.store is None:
        raise ArgumentError("conversations are not kept with --no-history")
    rows, lines = [("", "name", "turns", "first message")], []
    for number, name in enumerate(chat.store.names(), start=1):
        try:
            talk = chat.store.load(name)
        except PhicoreError as error:
            lines.append(str(error))
            continue
        mark = "*" if name == chat.conversation.name else " "
        count = str(len(talk.path(talk.current)))
        rows.append((f"{mark}{number}", name, count, short(talk.title)))
    if len(rows) == 1:
        return Reply([*lines, "no conversations yet"])
    return Reply(rows=rows, lines=[*lines, "/load NAME, or its number, goes on with one."])


def session_names(chat: Chat) -> Iterable[str]:
    """Return the names of all conversations."""
    return [] if chat.store is None else chat.store.names()
