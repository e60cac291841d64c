"""Commands that show or change how answers are made."""

from __future__ import annotations

import re

from phicore.chat.blocks import QUOTES, content
from phicore.chat.chat import Chat
from phicore.chat.replies import Reply, integer
from phicore.chat.settings import parameter, parsed, shown
from phicore.errors import ArgumentError


def system(chat: Chat, argument: str) -> Reply:
    """Show or set the system message."""
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


def set_parameter(chat: Chat, argument: str) -> Reply:
    """Show all parameters or one, or set one."""
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
        return seed(chat, text)
    found = parameter(name)
    if not text:
        return Reply([f"{found.name} {shown(options[found.name])}", found.help])
    value = None if text == "default" else parsed(found.name, text)
    if found.default == [] and text == "none":
        value = []
    chat.set(found.name, value)
    chat.save()
    return Reply([f"{found.name} {shown(chat.options()[found.name])}"])


def seed(chat: Chat, argument: str) -> Reply:
    """Show or set the seed of the next answer."""
    if argument == "random":
        chat.next_seed = None
    elif argument:
        seed = integer("seed", argument, "0 to 2**64 - 1, or random")
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
