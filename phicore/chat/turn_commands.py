"""Commands that answer anew, take turns back, or hide them."""

from __future__ import annotations

from phicore.chat.blocks import content
from phicore.chat.chat import Chat
from phicore.chat.replies import Reply, count_of, integer, short
from phicore.chat.setting_commands import seed
from phicore.errors import ArgumentError


def retry(chat: Chat, argument: str) -> Reply:
    """Begin another answer to the last message, with a seed if one is given."""
    if argument:
        seed(chat, argument)
    return Reply(answering=chat.retry())


def edit(chat: Chat, argument: str) -> Reply:
    """Begin the answer to another message in place of the last, or give the last to change."""
    if argument:
        return Reply(answering=chat.edit(content(argument)))
    last = chat.conversation.last
    if last is None:
        raise ArgumentError("there is no message to edit")
    return Reply(draft=last.user, edits=True)


def undo(chat: Chat, argument: str) -> Reply:
    """Take back the last turns."""
    count = integer("undo", argument, "a number of turns") if argument else 1
    undone = chat.conversation.undo(count)
    chat.save()
    return Reply(
        [f"{count_of(count, 'turn')} undone: {short(undone[0].user)}", "/redo takes it back."]
    )


def redo(chat: Chat, argument: str) -> Reply:
    """Take back an undo."""
    turn = chat.conversation.redo()
    chat.save()
    return Reply(turn=turn)


def branch(chat: Chat, argument: str) -> Reply:
    """List the turns in the place of the last one, or go to one of them."""
    found = chat.conversation.alternatives()
    if not found:
        raise ArgumentError("there is no answer yet")
    if argument:
        number = integer("branch", argument, f"1 to {len(found)}")
        if not 1 <= number <= len(found):
            raise ArgumentError(parameter="branch", expected=f"1 to {len(found)}", got=number)
        chat.conversation.go(found[number - 1].number)
        chat.save()
        return Reply(turn=found[number - 1])
    rows = [("", "message", "answer", "seed")]
    for number, turn in enumerate(found, start=1):
        mark = "*" if turn.number == chat.conversation.current else " "
        rows.append((f"{mark}{number}", short(turn.user), short(turn.answer, 40), str(turn.seed)))
    return Reply(rows=rows, lines=["/branch N goes on from another one."])


def drop(chat: Chat, argument: str) -> Reply:
    """Hide the oldest turns from the model."""
    count = integer("drop", argument, "a number of turns") if argument else 1
    talk = chat.conversation
    talk.drop(count)
    chat.save()
    rest = len(talk.path(talk.current)) - talk.dropped
    if not rest:
        return Reply(["the model has forgotten all turns; the file keeps them"])
    seen = "the last turn" if rest == 1 else f"the last {rest} turns"
    system = "" if talk.system is None else "the system message and "
    return Reply([f"the model sees {system}{seen} from now on; the file keeps all"])
