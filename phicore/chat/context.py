"""The room in the context: what is told before it is full, and what makes room."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING

from phicore.chat.conversation import Conversation, Turn
from phicore.errors import ContextError

if TYPE_CHECKING:
    from phicore.model import Model

OTHERS = "/undo takes back the last turn, /clear begins anew"
WAYS = f"/drop N lets the model forget the oldest turns, {OTHERS}"


def tokens_of(model: Model, talk: Conversation, turn: Turn) -> int:
    """Return the number of tokens of the prompt of a turn."""
    return len(model.encode(talk.messages_of(turn)))


def checked_room(model: Model, talk: Conversation, turn: Turn, tokens: int) -> str | None:
    """Return a warning if a prompt of so many tokens leaves little room for an answer.

    Raises:
        ContextError: If it leaves none.
    """
    context = model.context
    most = turn.options["max_tokens"]
    wanted = min(context // 16, 256, context if most == -1 else most)
    if tokens + wanted <= context:
        return None
    hint = _hint(model, talk, turn, context - wanted)
    if tokens >= context:
        raise ContextError(
            f"the message is not sent: with it, the conversation has {tokens} tokens, and the "
            f"context holds {context}, the answer included; {hint}"
        )
    return f"{context - tokens} tokens of the context are left for the answer; {hint}"


def _hint(model: Model, talk: Conversation, turn: Turn, most: int) -> str:
    """Return what makes a prompt have at most a number of tokens."""
    path = talk.path(turn.parent)
    counts = range(1, len(path) - turn.dropped + 1)

    def fits(count: int) -> bool:
        return tokens_of(model, talk, replace(turn, dropped=turn.dropped + count)) <= most

    if (found := bisect_left(counts, True, key=fits)) < len(counts):
        count = counts[found]
        turns = "turn" if count == 1 else f"{count} turns"
        return f"/drop {count} makes room (the model forgets the oldest {turns}); {OTHERS}"
    if not path:
        return "shorten the message, or begin with a larger --ctx"
    return "no turns make enough room: shorten the message, or /clear begins anew"
