"""A generation under way: an iterator over the pieces of an answer."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Self

from phicore.engine import Engine
from phicore.engine import Sequence as EngineSequence
from phicore.plugins.observers import Observers
from phicore.text.pieces import Piece, Pieces


class Generation:
    """An iterator of `Piece`, one per token. It may be closed early or left unfinished.

    Only one thread may use it.

    Attributes:
        seed: The seed in use, so that a random seed can be used again.
        prompt_ids: The tokens of the prompt.
        timings: The times and token counts so far.
    """

    def __init__(
        self,
        engine: Engine,
        sequence: EngineSequence,
        pieces: Pieces,
        observers: Observers | None = None,
    ) -> None:
        assert sequence.request.seed is not None, "filled in by Request"
        self.seed = sequence.request.seed
        self.prompt_ids = list(sequence.request.prompt_ids)
        self.timings = sequence.timings
        found = _pieces(engine, sequence, pieces)
        self._pieces = found if observers is None else observers.watch(self, found)
        # A generation that is never started or closed is removed from the engine when it is
        # garbage-collected.
        weakref.finalize(self, engine.abort, sequence).atexit = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def text(self) -> str:
        """Generate the rest of the answer, and return its text."""
        return "".join(piece.text for piece in self)

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()  # type: ignore[attr-defined]  # a generator

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _pieces(engine: Engine, sequence: EngineSequence, pieces: Pieces) -> Iterator[Piece]:
    """Run a sequence until it finishes or its text has a stop string, and yield its pieces."""
    outputs = engine.outputs(sequence)
    try:
        for output in outputs:
            for number, token in enumerate(output.tokens, start=1):
                is_last = number == len(output.tokens)
                piece = pieces.push(token, output.finish_reason if is_last else None)
                yield piece
                if piece.finish_reason is not None:
                    return
    finally:
        outputs.close()
