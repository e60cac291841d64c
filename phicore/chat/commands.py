"""The commands of a chat, such as `/retry`: their names, their help, and what they do.

A command changes the chat, and returns a `Reply` that says what is to be shown or done. It knows
nothing of the terminal.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from phicore.chat import file_commands, setting_commands, turn_commands
from phicore.chat.chat import Chat
from phicore.chat.replies import Reply, count_of
from phicore.chat.settings import PARAMETERS, parameter
from phicore.errors import ArgumentError


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
    if t is not None and t.drafted_tokens:
        guessed = count_of(t.drafted_tokens, "token")
        lines.append(f"speculation: {guessed} guessed, {t.accepted_tokens} of them right")
    used = chat.used()
    dropped = f", {count_of(talk.dropped, 'turn')} dropped" if talk.dropped else ""
    lines.append(f"context: {used} of {model.context} tokens ({used / model.context:.0%}){dropped}")
    if chat.store is not None and talk.name:
        lines.append(f"conversation: {chat.store.path(talk.name)}")
    return Reply(lines)


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
        setting_commands.system,
    ),
    Command(
        "set",
        "[NAME [VALUE]]",
        "Show or set a parameter, such as temperature. The value default takes it back.",
        setting_commands.set_parameter,
        lambda chat: [*PARAMETERS, "seed"],
    ),
    Command(
        "seed",
        "[N|random]",
        "Show or set the seed. The same seed gives the same answer.",
        setting_commands.seed,
        lambda chat: ["random"],
    ),
    Command(
        "retry", "[SEED]", "Answer the last message anew.", turn_commands.retry, others=("regen",)
    ),
    Command("edit", "[TEXT]", "Change the last message, and answer it anew.", turn_commands.edit),
    Command("undo", "[N]", "Take back the last turn, or the last N turns.", turn_commands.undo),
    Command("redo", "", "Take back an /undo.", turn_commands.redo),
    Command(
        "branch", "[N]", "List the other answers to this place, or go to one.", turn_commands.branch
    ),
    Command(
        "clear",
        "",
        "Begin a new conversation with the same settings.",
        file_commands.clear,
        others=("new",),
    ),
    Command(
        "drop",
        "[N]",
        "Let the model forget the oldest turn, or the N oldest turns; the system message stays.",
        turn_commands.drop,
    ),
    Command(
        "save",
        "[NAME|FILE]",
        "Name the conversation, or write it to a file that ends in .md or .json.",
        file_commands.save,
    ),
    Command(
        "load",
        "NAME",
        "Go on with another conversation.",
        file_commands.load,
        file_commands.session_names,
    ),
    Command("sessions", "", "List the conversations.", file_commands.sessions, others=("list",)),
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
