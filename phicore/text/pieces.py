"""Turns the tokens of an answer into pieces of text, one for each token."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from phicore.text.logprobs import TokenLogprobs
from phicore.text.stop_strings import StopStrings
from phicore.text.tokenizer import TextStream


@dataclass(frozen=True)
class Piece:
    """A generated token and its text.

    Attributes:
        text: The text that the token completed. It is empty if the token prints nothing, or if it
            leaves a character or a possible stop string incomplete.
        token_id: The token.
        finish_reason: The reason on the last piece, otherwise None: "stop" (an end token or a stop
            string), "length" (`max_tokens` were generated) or "context" (the context is full).
        logprobs: The log probabilities of the token: one element, or none if the request does not
            ask for them.
    """

    text: str
    token_id: int
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class Pieces:
    """Makes the pieces of one answer. The last piece has all text that was held back."""

    def __init__(self, stream: TextStream, stops: StopStrings, ends: Collection[int]) -> None:
        self._stream = stream
        self._stops = stops
        self._ends = ends

    def push(
        self,
        token: int,
        finish_reason: str | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> Piece:
        """Return the piece for the next token.

        A stop string in the text makes the piece the last one, with finish reason "stop".

        Args:
            finish_reason: The reason why the token is the last one, or None.
            logprobs: The log probabilities of the token, if there are some.
        """
        stops = self._stops
        # An end token prints nothing, even if the file gives it the type of text.
        text = "" if token in self._ends else stops.push(self._stream.push(token))
        if stops.is_stopped:
            finish_reason = "stop"
        if finish_reason is not None:
            text += stops.push(self._stream.flush()) + stops.flush()
            if stops.is_stopped:  # a stop string was in the text that had been held back
                finish_reason = "stop"
        return Piece(text, token, finish_reason, logprobs)
