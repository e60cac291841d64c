"""An answer under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from phicore.chat.conversation import Turn

if TYPE_CHECKING:
    from phicore.generation import Generation
    from phicore.text.pieces import Piece

    End = Callable[[Turn, Generation], None]


class Answering:
    """An answer under way: an iterator of pieces, and a context manager that stores it at the end.

    Attributes:
        turn: The turn, without its answer until the context ends.
        generation: The generation.
        is_discarded: Whether nothing was there to keep when the context ended.
        keeps_message: Whether the message is kept even if the answer has not begun.
    """

    def __init__(self, turn: Turn, generation: Generation, *, ended: End, discarded: End) -> None:
        """Begin.

        Args:
            ended: Called with the turn and the generation when the context ends.
            discarded: Called with them instead if there is nothing to keep.
        """
        self.turn = turn
        self.generation = generation
        self.is_discarded = False
        self.keeps_message = False
        self._ended = ended
        self._discarded = discarded
        self._pieces: list[Piece] = []

    @property
    def text(self) -> str:
        """Return the text so far."""
        return "".join(piece.text for piece in self._pieces)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        piece = next(self.generation)
        self._pieces.append(piece)
        return piece

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.generation.close()
        reason = self._pieces[-1].finish_reason if self._pieces else None
        if not self.text and reason is None and not self.keeps_message:
            self.is_discarded = True
            self._discarded(self.turn, self.generation)
            return
        timings = self.generation.timings
        self.turn = replace(
            self.turn,
            answer=self.text,
            finish_reason=reason or "interrupted",
            prompt_tokens=timings.prompt_tokens,
            cached_tokens=timings.cached_tokens,
            generated_tokens=len(self._pieces),
        )
        self._ended(self.turn, self.generation)
