"""The thread that computes: it alone runs the engine's steps."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from phicore.errors import FAULTS, PhicoreError
from phicore.model import Model
from phicore.plugins import blaming
from phicore.server.errors import ApiError, api_error, full, stopping
from phicore.server.faults import Watch, tell
from phicore.server.jobs import Job
from phicore.server.memory import give_back
from phicore.text.pieces import Piece

log = logging.getLogger(__name__)

MOST_FAULTS = 3
"""After so many faults without a good step between them, the thread ends."""
REST_S = 5.0
"""After so many seconds without work, the process gives memory back to the system."""


class Watcher(Protocol):
    """Gets told what the thread does; its methods must be quick."""

    def stepped(self, worker: Worker) -> None: ...
    def advanced(self, job: Job, tokens: int) -> None: ...
    def ended(self, job: Job, reason: str) -> None: ...


class Worker:
    """Runs the engine of a model in a thread of its own.

    A step's results go to each event loop all at once. An answer that is cancelled leaves the
    engine before the next step.

    Attributes:
        model: The model.
        jobs: The answers that the engine has; only the thread changes this.
    """

    def __init__(
        self,
        model: Model,
        *,
        most: int,
        watcher: Watcher,
        died: Callable[[BaseException], None] = lambda error: None,
        watch: Watch | None = None,
    ) -> None:
        """Make a worker.

        Args:
            most: The largest number of answers that run and wait.
            watcher: Is told of steps, tokens and ends.
            died: Called in the thread if it cannot go on.
            watch: Notices that a plugin blocks the thread.
        """
        self.model = model
        self.jobs: list[Job] = []
        self._most = most
        self._watcher = watcher
        self._died = died
        self._watch = watch
        self._faults = 0
        self._submitted: list[Job] = []
        self._count = 0
        self._is_over = False
        self._is_woken = False
        self._has_rested = False
        self._condition = threading.Condition()

    # ---- called by coroutines --------------------------------------------------------------

    def submit(self, jobs: Sequence[Job]) -> None:
        """Add answers to compute.

        Raises:
            ApiError: If too many are computed or wait, or the thread has ended.
        """
        with self._condition:
            if self._is_over:
                raise stopping()
            if len(jobs) > self._most:
                raise ApiError(f"expected at most {self._most} answers in a request", param="n")
            if self._count + len(jobs) > self._most:
                raise full(self._count)
            self._submitted += jobs
            self._count += len(jobs)
            self._condition.notify()

    def wake(self) -> None:
        """Let the thread look for cancelled answers."""
        with self._condition:
            self._is_woken = True
            self._condition.notify()

    def stop(self) -> None:
        """Let the thread end after the current step; its answers fail."""
        with self._condition:
            self._is_over = True
            self._condition.notify()

    @property
    def count(self) -> int:
        """Return the number of answers that run or wait."""
        return self._count

    @property
    def waiting(self) -> int:
        """Return the number of answers that wait."""
        return len(self._submitted) + len(self.model.engine.scheduler.waiting)

    # ---- the thread ------------------------------------------------------------------------

    def run(self) -> None:
        """Compute until `stop` is called."""
        watch = self._watch
        try:
            if watch is not None:
                watch.backend = blaming.home(self.model.engine.runner.ops)
            while self._wait():
                if watch is None:
                    self._tick()
                    continue
                watch.begin()
                self._tick()
                watch.end()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is told
            tell(log, "the thread that computes has failed", error)
            self._end_all(api_error(error))
            self._died(error)
        finally:
            self._end_all(stopping())

    def _wait(self) -> bool:
        """Wait for work; return whether to go on."""
        while not self._take(None if self._has_rested else REST_S):
            self._has_rested = True
            give_back()
        return not self._is_over

    def _take(self, most_s: float | None) -> bool:
        """Wait for work and take it; return False if there is none for so many seconds."""
        with self._condition:
            if not self._condition.wait_for(self._has_work, most_s):
                return False
            self._is_woken = False
            new, self._submitted = self._submitted, []
        self.jobs += new
        self._has_rested = self._has_rested and not new
        return True

    def _has_work(self) -> bool:
        return bool(self.jobs or self._submitted or self._is_woken or self._is_over)

    def _tick(self) -> None:
        """Take requests in and out, run a step, and tell its results."""
        found: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = defaultdict(list)
        for job in list(self.jobs):
            if job.is_cancelled:
                self._end(job, "abort")
            elif job.generation is None:
                try:
                    job.generation = self.model.generate(job.request)
                except FAULTS as error:  # the request is at fault
                    self._end(job, "error")
                    found[job.exchange.loop].append(partial(self._refused, job, error))
                else:
                    found[job.exchange.loop].append(partial(_taken, job))
        try:
            if self.jobs:
                self.model.engine.step()
                self._faults = 0
            for job in list(self.jobs):
                self._collect(job, found[job.exchange.loop])
            self._watcher.stepped(self)
        except FAULTS as error:
            self._faults += 1
            if self._faults == 1:
                tell(log, "a step has failed; the answers that were computed fail", error)
            self._end_all(api_error(error))
            if self._faults >= MOST_FAULTS:
                raise
        _deliver(found)

    def _collect(self, job: Job, calls: list[Callable[[], None]]) -> None:
        """Take the pieces of an answer that are there."""
        generation = job.generation
        assert generation is not None
        pieces: list[Piece] = []
        try:
            while generation.is_ready and (not pieces or pieces[-1].finish_reason is None):
                piece = next(generation, None)
                if piece is None:
                    raise PhicoreError("somebody else has ended this answer")
                pieces.append(piece)
        except FAULTS as error:  # an answer's error concerns no other
            self._end(job, "error")
            calls.append(partial(self._refused, job, error))
            return
        if pieces:
            self._watcher.advanced(job, len(pieces))
            calls.append(partial(job.push, pieces))
            if (reason := pieces[-1].finish_reason) is not None:
                self._end(job, reason)

    def _end(self, job: Job, reason: str) -> None:
        """Take an answer out of the engine."""
        if job in self.jobs:
            self.jobs.remove(job)
            with self._condition:
                self._count -= 1
            if job.generation is not None:
                job.generation.close()
            self._watcher.ended(job, reason)

    def _end_all(self, error: ApiError) -> None:
        """End all answers because of an error, those that were submitted meanwhile included."""
        with self._condition:
            self.jobs += self._submitted
            self._submitted = []
        found: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = defaultdict(list)
        for job in list(self.jobs):
            self._end(job, "error")
            found[job.exchange.loop].append(partial(job.exchange.fail, error))
        _deliver(found)

    def _refused(self, job: Job, error: BaseException) -> None:
        found = api_error(error, job.exchange.spell, self.model.context)
        if found.status == 500:
            tell(log, "an answer has failed", error, request_id=job.exchange.request_id)
        job.exchange.fail(found)


def _taken(job: Job) -> None:
    job.is_taken = True
    job.exchange.wake()


def _deliver(found: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]]) -> None:
    """Let each event loop make its calls, all of a step at once."""
    for loop, calls in found.items():
        if not calls:
            continue
        try:
            loop.call_soon_threadsafe(_call_all, calls)
        except RuntimeError:  # the loop is closed, so nobody waits any more
            log.debug("an event loop has ended before its answers")


def _call_all(calls: Sequence[Callable[[], None]]) -> None:
    for call in calls:
        call()
