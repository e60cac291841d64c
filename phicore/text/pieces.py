"""From the tokens of an answer to pieces of text, one for each token."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from phicore.text.stop_strings import StopStrings
from phicore.text.tokenizer import TextStream


@dataclass(frozen=True)
class Piece:
    """One generated token.

    Attributes:
        text: The text that the token completed. It is empty while a character, or what may be a
            stop string, is incomplete, and for a token that prints nothing.
        token_id: The token.
        finish_reason: None, except on the last piece: "stop" (an end token or a stop string),
            "length" (`max_tokens` are there) or "context" (the context is full).
    """

    text: str
    token_id: int
    finish_reason: str | None = None


class Pieces:
    """Makes the pieces of one answer. The last piece carries whatever text was held back."""

    def __init__(self, stream: TextStream, stops: StopStrings, ends: Collection[int]) -> None:
        self._stream = stream
        self._stops = stops
        self._ends = ends

    def push(self, token: int, finish_reason: str | None = None) -> Piece:
        """The piece of the next token.

        Args:
            finish_reason: Why the token is the last one, if it is. A stop string makes it the last
                one, too.
        """
        stops = self._stops
        # An end token prints nothing, even if the file calls it text.
        text = "" if token in self._ends else stops.push(self._stream.push(token))
        if stops.is_stopped:
            finish_reason = "stop"
        if finish_reason is not None:
            text += stops.push(self._stream.flush()) + stops.flush()
            if stops.is_stopped:  # by text that had been held back
                finish_reason = "stop"
        return Piece(text, token, finish_reason)
