"""Log probabilities in the forms of OpenAI's API.

The tokens that are told join to the text of the answer. So an end token and the tokens of a stop
string are left out, and tokens whose text is held back are told with it. (A token that begins with
the answer's last letters and ends with a stop string is told whole.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from phicore.text.logprobs import TokenLogprobs
from phicore.text.pieces import Piece
from phicore.text.tokenizer import Tokenizer

LEAST = -9999.0
"""What stands for minus infinity, which JSON has not."""


class Logprobs(ABC):
    """Makes the log probabilities of one choice, part by part.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: list[Piece] = []
        self._is_first = True

    def part(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        """Return what the next pieces tell; None if they tell nothing yet."""
        told: list[Piece] = []
        for piece in pieces:
            self._held.append(piece)
            if piece.text or piece.finish_reason not in (None, "stop"):
                told += self._held
                self._held = []
        spellings = [self._spelling(each.token) for piece in told for each in piece.logprobs]
        if spellings and self._is_first:
            self._is_first = False
            text = "".join(piece.text for piece in told)
            if spellings[0].startswith(b" ") and not text.startswith(" "):
                spellings[0] = spellings[0][1:]  # the space that encoding puts before a text
        return self._made(told, spellings) if spellings else None

    @abstractmethod
    def _made(self, pieces: Sequence[Piece], spellings: Sequence[bytes]) -> dict[str, Any]:
        """Return the object for pieces and the bytes of their tokens."""

    def _spelling(self, token: int) -> bytes:
        """Return the bytes of a token; those of a control token are its name."""
        if self._tokenizer.is_control(token):
            return self._tokenizer.piece(token).encode()
        return self._tokenizer.token_bytes(token)


class ChatLogprobs(Logprobs):
    """Log probabilities as in /v1/chat/completions.

    A token is told as text and as bytes. If it is a part of a character, its text has U+FFFD.
    """

    def _made(self, pieces: Sequence[Piece], spellings: Sequence[bytes]) -> dict[str, Any]:
        found = [each for piece in pieces for each in piece.logprobs]
        content = []
        for each, data in zip(found, spellings, strict=True):
            top = [_token(self._spelling(token), logprob) for token, logprob in each.top]
            content.append({**_token(data, each.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


def _token(data: bytes, logprob: float) -> dict[str, Any]:
    text = data.decode(errors="replace")
    return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(data)}


class TextLogprobs(Logprobs):
    """Log probabilities as in /v1/completions: four lists, with an element for each token.

    Args:
        tokenizer: The model's tokenizer.
        offset: The number of characters before the answer.
    """

    def __init__(self, tokenizer: Tokenizer, offset: int = 0) -> None:
        super().__init__(tokenizer)
        self._offset = offset

    def _made(self, pieces: Sequence[Piece], spellings: Sequence[bytes]) -> dict[str, Any]:
        found = [each for piece in pieces for each in piece.logprobs]
        return self._lists(found, spellings, [len(piece.text) for piece in pieces])

    def prompt(
        self, text: str, ids: Sequence[int], scores: Sequence[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """Return the log probabilities of a prompt's tokens; the first has none.

        Args:
            text: The prompt as the client sees it.
            ids: Its tokens.
            scores: Their log probabilities.
        """
        known = [s or TokenLogprobs(id, 0.0) for id, s in zip(ids, scores, strict=True)]
        spellings = [self._spelling(id) for id in ids]
        self._offset = 0
        lengths = [len(spelling.decode(errors="ignore")) for spelling in spellings]
        extra = sum(lengths) - len(text)  # what encoding has put before the text
        for index, length in enumerate(lengths):
            cut = min(length, max(extra, 0))
            lengths[index] -= cut
            extra -= cut
        made = self._lists(known, spellings, lengths)
        for index, score in enumerate(scores):
            if score is None:
                made["token_logprobs"][index] = made["top_logprobs"][index] = None
        return made

    def _lists(
        self,
        found: Sequence[TokenLogprobs],
        spellings: Sequence[bytes],
        lengths: Sequence[int],
    ) -> dict[str, Any]:
        offsets = []
        for length in lengths:
            offsets.append(self._offset)
            self._offset += length
        return {
            "tokens": [_text(data) for data in spellings],
            "token_logprobs": [max(each.logprob, LEAST) for each in found],
            "top_logprobs": [
                self._top(each, data) for each, data in zip(found, spellings, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, found: TokenLogprobs, data: bytes) -> dict[str, float]:
        """Return the alternatives and the token by their texts; of equal texts the likeliest."""
        top: dict[str, float] = {}
        for token, logprob in found.top:
            top.setdefault(_text(self._spelling(token)), max(logprob, LEAST))
        top.setdefault(_text(data), max(found.logprob, LEAST))
        return top


def _text(data: bytes) -> str:
    """Return the text of a token; a part of a character is told as OpenAI tells it."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def joined(parts: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Join the lists of consecutive parts of a choice of /v1/completions."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return {name: [each for part in found for each in part[name]] for name in found[0]}
