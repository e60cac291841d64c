"""Answers that are computed for a client: between the thread that computes and the coroutines."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from phicore.engine import Request, Timings
from phicore.errors import PhicoreError
from phicore.generation import Generation
from phicore.server.errors import ApiError, api_error, out_of_time
from phicore.server.logs import request_id
from phicore.text.pieces import Piece

MOST_UNREAD = 16384
"""A client that leaves so many pieces of an answer unread gets no more of it."""


class Computes(Protocol):
    """The thread that computes."""

    def submit(self, jobs: Sequence[Job]) -> None: ...
    def wake(self) -> None: ...


class Job:
    """One answer.

    The thread that computes uses `generation`; everything else belongs to the event loop.

    Attributes:
        request: The request.
        exchange: The exchange that it is a part of.
        generation: The generation once the engine has the request.
        is_cancelled: Whether nobody waits for the answer any more. The thread that computes reads
            it before each step.
        is_taken: Whether the engine has the request.
        pieces: The pieces that nobody has taken yet.
        count: The number of tokens so far.
        finish_reason: Why the answer has ended; None as long as it goes on.
        added_s, first_s, last_s: The times at which the request, its first token (None before it)
            and its newest token came.
    """

    def __init__(self, request: Request, exchange: Exchange) -> None:
        self.request = request
        self.exchange = exchange
        self.generation: Generation | None = None
        self.is_cancelled = False
        self.is_taken = False
        self.pieces: deque[Piece] = deque()
        self.count = 0
        self.finish_reason: str | None = None
        self.added_s = self.last_s = time.perf_counter()
        self.first_s: float | None = None

    @property
    def timings(self) -> Timings:
        """Return the times and token counts so far."""
        return Timings() if self.generation is None else self.generation.timings

    def push(self, pieces: Sequence[Piece]) -> None:
        """Add pieces. The event loop calls this."""
        if self.finish_reason is not None or self.exchange.error is not None:
            return
        self.count += len(pieces)
        self.pieces += pieces
        if pieces:
            self.finish_reason = pieces[-1].finish_reason
        if len(self.pieces) > MOST_UNREAD:
            self.exchange.fail(ApiError("the client reads too slowly", status=408))
        self.exchange.wake()


class Exchange:
    """The answers of one request of HTTP.

    Attributes:
        jobs: The answers, one for each choice.
        error: Why the exchange has failed; None as long as it has not.
        spell: Returns the field of the client's request for a parameter in Python.
        request_id: The identifier of the client's request, for logs.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        worker: Computes,
        *,
        end_s: float,
        spell: Callable[[str], str],
    ) -> None:
        """Prepare to compute answers.

        Args:
            worker: The thread that computes.
            end_s: The exchange fails at this time of the event loop.
            spell: Returns the field of the client's request for a parameter in Python.
        """
        self.spell = spell
        self.request_id = request_id.get()
        self.loop = asyncio.get_running_loop()
        self.error: ApiError | None = None
        self.jobs = [Job(request, self) for request in requests]
        self._worker = worker
        self._changed = asyncio.Event()
        self._timer = self.loop.call_at(end_s, lambda: self.fail(out_of_time()))

    async def begin(self) -> None:
        """Give the requests to the engine, and wait until it has accepted them.

        Raises:
            ApiError: If it refuses one, or too many requests wait.
        """
        try:
            self._worker.submit(self.jobs)
        except PhicoreError as error:
            self.fail(api_error(error))
        while self.error is None and not all(job.is_taken for job in self.jobs):
            await self._wait()
        if self.error is not None:
            raise self.error

    async def pieces(self, ping_s: float) -> AsyncIterator[tuple[int, list[Piece]]]:
        """Yield the pieces of the answers as they come, with the index of the answer.

        Without pieces for some time, an index of -1 is yielded.

        Args:
            ping_s: The time in seconds.
        Raises:
            ApiError: If an answer fails.
        """
        ended: set[int] = set()
        while len(ended) < len(self.jobs):
            if self.error is not None:
                raise self.error
            self._changed.clear()
            found = [i for i, job in enumerate(self.jobs) if job.pieces]
            for index in found:
                job = self.jobs[index]
                taken, job.pieces = list(job.pieces), deque()
                if job.finish_reason is not None:
                    ended.add(index)
                yield index, taken
            if not found and self.error is None and not await self._wait(ping_s):
                yield -1, []

    def fail(self, error: ApiError) -> None:
        """End all answers because of an error."""
        if self.error is None:
            self.error = error
        self.close()
        self.wake()

    def close(self) -> None:
        """End what still runs. This may be called at any time, and several times."""
        self._timer.cancel()
        for job in self.jobs:
            job.is_cancelled = True
        self._worker.wake()

    def wake(self) -> None:
        """Let the coroutine look again that waits."""
        self._changed.set()

    async def _wait(self, most_s: float | None = None) -> bool:
        """Wait for a change; return whether there was one in this time."""
        try:
            async with asyncio.timeout(most_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True
