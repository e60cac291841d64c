"""The commands of a chat, such as `/retry`: their names, their help, and what they do.

A command changes the chat, and returns a `Reply` that says what is to be shown or done. It knows
nothing of the terminal.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from phicore.chat import files
from phicore.chat.blocks import QUOTES, content
from phicore.chat.chat import Answering, Chat
from phicore.chat.conversation import Turn
from phicore.chat.settings import PARAMETERS, parameter, parsed, shown
from phicore.errors import ArgumentError, ConversationError, PhicoreError


@dataclass(frozen=True)
class Reply:
    """What a command asks the program to show or to do.

    Attributes:
        lines: Lines to show.
        rows: The rows of a table to show; the first one is its head.
        answering: An answer to run and show.
        draft: A text that the user will change and send; `edits` says for what.
        edits: Whether the draft replaces the last message.
        copied: A text for the clipboard.
        turn: A turn to show, since it is now the last one.
        ends: Whether the chat ends.
    """

    lines: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    answering: Answering | None = None
    draft: str | None = None
    edits: bool = False
    copied: str | None = None
    turn: Turn | None = None
    ends: bool = False


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: The name, without "/".
        arguments: The arguments, as help texts show them.
        help: What it does, in complete sentences.
        run: Runs it on a chat with the text after its name.
        words: Returns what its argument may be, for completion.
        others: Other names.
    """

    name: str
    arguments: str
    help: str
    run: Callable[[Chat, str], Reply]
    words: Callable[[Chat], Iterable[str]] = field(default=lambda chat: ())
    others: tuple[str, ...] = ()


_COMMAND = re.compile(r"/([a-zA-Z?]+)(?:\s+(.*))?", re.DOTALL)


def split(line: str) -> tuple[str, str] | None:
    """Return the name and the argument of a command, or None for a message.

    A message may begin with "//", of which one is dropped, or with a path such as "/etc/hosts".
    """
    found = _COMMAND.fullmatch(line.strip())
    return None if found is None else (found[1].lower(), (found[2] or "").strip())


def message_of(line: str) -> str:
    """Return the message that a line which is no command says."""
    return line[1:] if line.startswith("//") else line


def run(chat: Chat, name: str, argument: str) -> Reply:
    """Run a command.

    Raises:
        ArgumentError: If there is no such command, or its argument is not allowed.
        PhicoreError: If it cannot be done.
    """
    command = BY_NAME.get(name)
    if command is None:
        near = difflib.get_close_matches(name, BY_NAME, 1)
        hint = f"; did you mean /{near[0]}?" if near else "; /help lists them"
        raise ArgumentError(
            f"there is no command /{name}{hint} (a message that begins so is sent with //)"
        )
    if argument and not command.arguments:
        raise ArgumentError(f"/{command.name} has no argument")
    return command.run(chat, argument)


def _help(chat: Chat, argument: str) -> Reply:
    if argument:
        name = argument.removeprefix("/").lower()
        if name in BY_NAME:
            command = BY_NAME[name]
            return Reply([f"/{command.name} {command.arguments}".rstrip(), command.help])
        found = parameter(name)
        return Reply([found.name, f"{found.help} Expected: {found.expected}."])
    rows = [("", "")]
    rows += [(f"/{c.name} {c.arguments}".rstrip(), c.help) for c in COMMANDS]
    return Reply(
        rows=rows,
        lines=[
            'A message of several lines stands between """ and """, or has Alt-Enter in it.',
            "Ctrl-C stops an answer and keeps what is there. Ctrl-D ends the chat.",
        ],
    )


def _system(chat: Chat, argument: str) -> Reply:
    if not argument:
        system = chat.conversation.system
        if system is None:
            return Reply(["no system message; /system TEXT sets it"])
        return Reply([system or 'the system message is empty ("")'])
    if argument == "-":
        chat.set_system(None)
        said = "no system message from now on"
    elif argument in ('""', "''"):
        chat.set_system("")
        said = "the system message is empty from now on"
    else:
        chat.set_system(_unquoted(argument))
        said = "the system message holds from the next answer on"
    chat.save()
    return Reply([said])


def _unquoted(text: str) -> str:
    if text.startswith(QUOTES):
        return content(text)
    return text[1:-1] if len(text) > 2 and text[0] == text[-1] == '"' else text


def _set(chat: Chat, argument: str) -> Reply:
    options, given = chat.options(), chat.conversation.settings
    if not argument:
        rows = [("parameter", "value", "")]
        for each in options:
            rows.append((each, shown(options[each]), "set" if each in given else "default"))
        rows.append(("seed", "random" if chat.next_seed is None else str(chat.next_seed), ""))
        return Reply(rows=rows, lines=["/help PARAMETER says what it does."])
    form = re.fullmatch(r"([\w-]+)(?:\s*=\s*|\s+|$)(.*)", argument, re.DOTALL)
    if form is None:
        raise ArgumentError(f"expected /set NAME VALUE, got {argument!r:.40}")
    name, text = form[1], form[2].strip()
    if name.lower() == "seed":
        return _seed(chat, text)
    found = parameter(name)
    if not text:
        return Reply([f"{found.name} {shown(options[found.name])}", found.help])
    value = None if text == "default" else parsed(found.name, text)
    if found.default == [] and text == "none":
        value = []
    chat.set(found.name, value)
    chat.save()
    return Reply([f"{found.name} {shown(chat.options()[found.name])}"])


def _seed(chat: Chat, argument: str) -> Reply:
    if argument == "random":
        chat.next_seed = None
    elif argument:
        seed = _integer("seed", argument, "0 to 2**64 - 1, or random")
        if not 0 <= seed < 2**64:
            raise ArgumentError(parameter="seed", expected="0 to 2**64 - 1, or random", got=seed)
        chat.next_seed = seed
    last = chat.conversation.last
    lines = [] if last is None else [f"the last answer has the seed {last.seed}"]
    if chat.next_seed is None:
        lines.append("the next answer has a random seed")
    else:
        lines.append(
            f"the next answer has the seed {chat.next_seed}, and each one after it one more"
        )
    return Reply(lines)


def _retry(chat: Chat, argument: str) -> Reply:
    if argument:
        _seed(chat, argument)
    return Reply(answering=chat.retry())


def _edit(chat: Chat, argument: str) -> Reply:
    if argument:
        return Reply(answering=chat.edit(content(argument)))
    last = chat.conversation.last
    if last is None:
        raise ArgumentError("there is no message to edit")
    return Reply(draft=last.user, edits=True)


def _undo(chat: Chat, argument: str) -> Reply:
    count = _integer("undo", argument, "a number of turns") if argument else 1
    undone = chat.conversation.undo(count)
    chat.save()
    return Reply(
        [f"{count_of(count, 'turn')} undone: {_short(undone[0].user)}", "/redo takes it back."]
    )


def _redo(chat: Chat, argument: str) -> Reply:
    turn = chat.conversation.redo()
    chat.save()
    return Reply(turn=turn)


def _branch(chat: Chat, argument: str) -> Reply:
    found = chat.conversation.alternatives()
    if not found:
        raise ArgumentError("there is no answer yet")
    if argument:
        number = _integer("branch", argument, f"1 to {len(found)}")
        if not 1 <= number <= len(found):
            raise ArgumentError(parameter="branch", expected=f"1 to {len(found)}", got=number)
        chat.conversation.go(found[number - 1].number)
        chat.save()
        return Reply(turn=found[number - 1])
    rows = [("", "message", "answer", "seed")]
    for number, turn in enumerate(found, start=1):
        mark = "*" if turn.number == chat.conversation.current else " "
        rows.append((f"{mark}{number}", _short(turn.user), _short(turn.answer, 40), str(turn.seed)))
    return Reply(rows=rows, lines=["/branch N goes on from another one."])


def _clear(chat: Chat, argument: str) -> Reply:
    old = chat.conversation
    chat.change_to(old.emptied())
    kept = f"; /load {old.name} goes back to the old one" if old.name else ""
    return Reply([f"a new conversation{kept}"])


def _drop(chat: Chat, argument: str) -> Reply:
    count = _integer("drop", argument, "a number of turns") if argument else 1
    talk = chat.conversation
    talk.drop(count)
    chat.save()
    rest = len(talk.path(talk.current)) - talk.dropped
    if not rest:
        return Reply(["the model has forgotten all turns; the file keeps them"])
    seen = "the last turn" if rest == 1 else f"the last {rest} turns"
    system = "" if talk.system is None else "the system message and "
    return Reply([f"the model sees {system}{seen} from now on; the file keeps all"])


def _save(chat: Chat, argument: str) -> Reply:
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
    chat.save()
    return Reply([f"saved: {chat.store.path(talk.name)}"])


def _export(chat: Chat, path: Path) -> Reply:
    as_text = files.to_markdown if path.suffix == ".md" else files.to_messages
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(as_text(chat.conversation))
    except FileExistsError:
        raise ArgumentError(f"{path} exists already; take another name") from None
    except OSError as error:
        raise ConversationError(f"{path}: cannot be written: {error.strerror}") from None
    return Reply([f"saved: {path}"])


def _load(chat: Chat, argument: str) -> Reply:
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
    """Return lines that say which conversation goes on."""
    talk = chat.conversation
    turns = count_of(len(talk.path(talk.current)), "turn")
    return [f"{talk.name}: {turns}, begun {talk.created[:10]}: {_short(talk.title)}"]


def _sessions(chat: Chat, argument: str) -> Reply:
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
        rows.append((f"{mark}{number}", name, count, _short(talk.title)))
    if len(rows) == 1:
        return Reply([*lines, "no conversations yet"])
    return Reply(rows=rows, lines=[*lines, "/load NAME, or its number, goes on with one."])


def _copy(chat: Chat, argument: str) -> Reply:
    last = chat.conversation.last
    if last is None:
        raise ArgumentError("there is no answer to copy")
    if argument not in ("", "code"):
        raise ArgumentError(parameter="copy", expected="nothing, or code", got=argument)
    if not argument:
        return Reply(copied=last.answer)
    blocks = re.findall(
        r"^ {0,3}(```+|~~~+)[^\n]*\n(.*?)(?:^ {0,3}\1[`~]*\s*$|\Z)", last.answer, re.M | re.S
    )
    if not blocks:
        raise ArgumentError("the last answer has no block of code")
    return Reply(copied=blocks[-1][1])


def _stats(chat: Chat, argument: str) -> Reply:
    model, talk, t = chat.model, chat.conversation, chat.timings
    lines = [f"model {model.path.name}, backend {model.backend} on {model.device}"]
    if (last := talk.last) is not None:
        lines.append(
            f"last answer: seed {last.seed}, prompt {count_of(last.prompt_tokens, 'token')} "
            f"({last.cached_tokens} known), generated {count_of(last.generated_tokens, 'token')} "
            f"({last.finish_reason})"
        )
    if t is not None and t.decode_tokens_per_s > 0:
        lines.append(
            f"speed: prompt {t.prompt_tokens_per_s:.1f} tokens/s, "
            f"answer {t.decode_tokens_per_s:.1f} tokens/s, first token {t.first_token_s:.2f} s"
        )
    used = chat.used()
    dropped = f", {count_of(talk.dropped, 'turn')} dropped" if talk.dropped else ""
    lines.append(f"context: {used} of {model.context} tokens ({used / model.context:.0%}){dropped}")
    if chat.store is not None and talk.name:
        lines.append(f"conversation: {chat.store.path(talk.name)}")
    return Reply(lines)


def _integer(name: str, text: str, expected: str) -> int:
    with suppress(ValueError):
        return int(text)
    raise ArgumentError(parameter=name, expected=expected, got=text)


def count_of(count: int, noun: str) -> str:
    """Return a number of things in words, such as "1 turn" and "2 turns"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _short(text: str, most: int = 50) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _session_names(chat: Chat) -> Iterable[str]:
    return [] if chat.store is None else chat.store.names()


COMMANDS: Sequence[Command] = (
    Command(
        "help",
        "[NAME]",
        "List the commands, or explain a command or a parameter.",
        _help,
        lambda chat: [*BY_NAME, *PARAMETERS],
        ("?",),
    ),
    Command(
        "system",
        "[TEXT]",
        'Show or set the system message. "" is an empty one, - is none.',
        _system,
    ),
    Command(
        "set",
        "[NAME [VALUE]]",
        "Show or set a parameter, such as temperature. The value default takes it back.",
        _set,
        lambda chat: [*PARAMETERS, "seed"],
    ),
    Command(
        "seed",
        "[N|random]",
        "Show or set the seed. The same seed gives the same answer.",
        _seed,
        lambda chat: ["random"],
    ),
    Command("retry", "[SEED]", "Answer the last message anew.", _retry, others=("regen",)),
    Command("edit", "[TEXT]", "Change the last message, and answer it anew.", _edit),
    Command("undo", "[N]", "Take back the last turn, or the last N turns.", _undo),
    Command("redo", "", "Take back an /undo.", _redo),
    Command("branch", "[N]", "List the other answers to this place, or go to one.", _branch),
    Command(
        "clear", "", "Begin a new conversation with the same settings.", _clear, others=("new",)
    ),
    Command(
        "drop",
        "[N]",
        "Let the model forget the oldest turn, or the N oldest turns; the system message stays.",
        _drop,
    ),
    Command(
        "save",
        "[NAME|FILE]",
        "Name the conversation, or write it to a file that ends in .md or .json.",
        _save,
    ),
    Command("load", "NAME", "Go on with another conversation.", _load, _session_names),
    Command("sessions", "", "List the conversations.", _sessions, others=("list",)),
    Command(
        "copy",
        "[code]",
        "Copy the last answer, or its last block of code, to the clipboard.",
        _copy,
        lambda chat: ["code"],
    ),
    Command("stats", "", "Show tokens, speeds, the seed and the use of the context.", _stats),
    Command(
        "bye", "", "End the chat.", lambda chat, _: Reply(ends=True), others=("exit", "quit", "q")
    ),
)

BY_NAME: Mapping[str, Command] = {
    name: command for command in COMMANDS for name in (command.name, *command.others)
}
