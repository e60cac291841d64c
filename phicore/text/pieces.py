"""From tokens to pieces of text, one for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from phicore.text.stop_strings import StopStrings
from phicore.text.tokenizer import TextStream


@dataclass(frozen=True)
class Piece:
    """One generated token.

    Attributes:
        text: The text that it completed: empty while a character, or what may be a stop string, is
            incomplete, and for a token that prints nothing.
        token_id: The token.
        finish_reason: None, but on the last piece: "stop" (an end token or a stop string), "length"
            (`max_tokens` are there) or "context" (the context is full).
    """

    text: str
    token_id: int
    finish_reason: str | None = None


def pieces(
    tokens: Iterator[int],
    limit: int,
    at_limit: str,
    ends: frozenset[int],
    stream: TextStream,
    stops: StopStrings,
) -> Iterator[Piece]:
    """From tokens to text. The last piece carries whatever text was held back."""
    for count, token in enumerate(tokens, start=1):
        is_end = token in ends  # such a token prints nothing, even if the file calls it text
        text = "" if is_end else stops.push(stream.push(token))
        if is_end or stops.is_stopped or count == limit:
            text += stops.push(stream.flush()) + stops.flush()
            is_stopped = is_end or stops.is_stopped
            yield Piece(text, token, "stop" if is_stopped else at_limit)
            return
        yield Piece(text, token)
