"""Generations under way: iterators over the pieces of an answer, or over many answers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

from phicore.engine import Engine, Request
from phicore.engine import Sequence as EngineSequence
from phicore.plugins.observers import Observers
from phicore.text.logprobs import TokenLogprobs
from phicore.text.pieces import Piece, Pieces
from phicore.tools import Text, message_of


class Generation:
    """An iterator of `Piece`, one per token. It may be closed early or left unfinished.

    Only one thread may use it.

    Attributes:
        seed: The seed in use, so that a random seed can be used again.
        prompt_ids: The tokens of the prompt.
        timings: The times and token counts so far.
        request: The request.
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
        self.request = sequence.request
        self._sequence = sequence
        self._abort = partial(engine.abort, sequence)
        self.timings = sequence.timings
        self._left: list[int] = []
        found = _pieces(engine, sequence, pieces, self._left)
        self._pieces = found if observers is None else observers.watch(self, found)
        # A generation that is never started or closed is removed from the engine when it is
        # garbage-collected.
        weakref.finalize(self, engine.abort, sequence).atexit = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    @property
    def token_ids(self) -> list[int]:
        """Return the tokens of the prompt, and of the answer so far."""
        return list(self._sequence.tokens)

    @property
    def is_ready(self) -> bool:
        """Return whether the next piece, or the end, is there without running a step."""
        outputs = self._sequence.outputs
        while outputs and outputs[0].is_empty:
            outputs.popleft()
        return bool(self._left or outputs) or self._sequence.finish_reason is not None

    def text(self) -> str:
        """Generate the rest of the answer, and return its text."""
        return "".join(piece.text for piece in self)

    def message(self) -> dict[str, Any]:
        """Generate the rest of the answer, and return it as a message.

        It has a role, a content and, if the answer calls tools, `tool_calls` in the form of
        OpenAI's API. A list of messages can go on with it. The text that was iterated over before
        is no part of it.
        """
        return message_for(self.request, self.text())

    def close(self) -> None:
        """Stop generating."""
        self._pieces.close()  # type: ignore[attr-defined]  # a generator
        self._abort()  # a generator that was never begun does nothing when it is closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class Answer:
    """An answer of `Model.generate_many`.

    Attributes:
        index: The number of the request, from 0.
        text: The text.
        token_ids: The tokens, the end token included.
        finish_reason: "stop", "length", "context" or "error".
        generation: The generation, which has the seed, the prompt's tokens and the times; None if
            the request was refused.
        error: Why there is no complete answer; None if there is one.
        logprobs: The log probabilities of the tokens; empty unless the request asks for them.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    generation: Generation | None
    error: Exception | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()

    def message(self) -> dict[str, Any]:
        """Return the answer as a message, as `Generation.message` does."""
        if self.generation is None:
            return message_of([Text(self.text)])
        return message_for(self.generation.request, self.text)


def message_for(request: Request, text: str) -> dict[str, Any]:
    """Return the message that an answer is: its text, and the tools that it calls."""
    if request.tools is None:
        return message_of([Text(text)])
    parser = request.tools.parser()
    return message_of([*parser.push(text), *parser.flush()])


class Answers:
    """Runs many requests, as many at a time as the engine takes, and yields their answers.

    Requests are taken one by one as others end, so they may come from a long file.
    """

    def __init__(
        self, begin: Callable[[Request], Generation], engine: Engine, requests: Iterable[Request]
    ) -> None:
        """Prepare to run requests.

        Args:
            begin: Makes the generation of a request; it may raise.
            engine: The engine that runs the generations.
            requests: The requests.
        """
        self._begin = begin
        self._engine = engine
        self._requests = enumerate(requests)
        self._running: dict[int, Generation] = {}
        self._pieces: dict[int, list[Piece]] = {}
        # One more than run at a time waits, so that no row waits for its request.
        self._most = 2 * engine.scheduler.max_sequences

    def __iter__(self) -> Iterator[Answer]:
        try:
            while True:
                yield from self._fill()
                if not self._running:
                    return
                if not any(generation.is_ready for generation in self._running.values()):
                    self._engine.step()
                yield from self._collect()
        finally:
            for generation in self._running.values():
                generation.close()

    def _fill(self) -> Iterator[Answer]:
        """Begin requests until enough of them run; yield those that are refused."""
        while len(self._running) < self._most:
            index, request = next(self._requests, (-1, None))
            if request is None:
                return
            try:
                self._running[index] = self._begin(request)
            except Exception as error:  # noqa: BLE001 - it stops no other request
                yield Answer(index, "", (), "error", None, error)
            else:
                self._pieces[index] = []

    def _collect(self) -> Iterator[Answer]:
        """Take the pieces that are there; yield the answers that are complete."""
        for index, generation in list(self._running.items()):
            pieces, is_over = self._pieces[index], False
            error: Exception | None = None
            try:
                while generation.is_ready and not is_over:
                    piece = next(generation, None)
                    is_over = piece is None or piece.finish_reason is not None
                    pieces += [] if piece is None else [piece]
            except Exception as caught:  # noqa: BLE001 - a processor may raise anything
                error, is_over = caught, True
            if is_over:
                generation.close()
                del self._running[index], self._pieces[index]
                reason = "error" if error or not pieces else pieces[-1].finish_reason or "error"
                text = "".join(piece.text for piece in pieces)
                ids = tuple(piece.token_id for piece in pieces)
                logprobs = tuple(found for piece in pieces for found in piece.logprobs)
                yield Answer(index, text, ids, reason, generation, error, logprobs)


def in_order(answers: Iterable[Answer]) -> Iterator[Answer]:
    """Yield answers in the order of their requests; those that are early are kept."""
    early: dict[int, Answer] = {}
    following = 0
    for answer in answers:
        early[answer.index] = answer
        while following in early:
            yield early.pop(following)
            following += 1


def _pieces(
    engine: Engine, sequence: EngineSequence, pieces: Pieces, left: list[int]
) -> Iterator[Piece]:
    """Run a sequence until it finishes or its text has a stop string, and yield its pieces.

    Args:
        left: Gets the tokens that were computed and whose pieces were not yielded yet.
    """
    outputs = engine.outputs(sequence)
    try:
        for output in outputs:
            for number, token in enumerate(output.tokens):
                left[:] = output.tokens[number + 1 :]
                is_last = not left
                reason = output.finish_reason if is_last else None
                piece = pieces.push(token, reason, output.logprobs[number : number + 1])
                yield piece
                if piece.finish_reason is not None:
                    return
    finally:
        outputs.close()
