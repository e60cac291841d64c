"""What the handlers of a server share: the model, the thread that computes, settings and names."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal
from weakref import WeakSet

from starlette.requests import ClientDisconnect, Request

from phicore.engine import Request as EngineRequest
from phicore.errors import TokenizerError
from phicore.model import Model
from phicore.server.errors import (
    ApiError,
    api_error,
    blocked,
    crowded,
    full,
    loading,
    out_of_time,
    stopping,
    too_long,
    wrong_field,
)
from phicore.server.faults import Watch, tell
from phicore.server.fields import Fields, parsed
from phicore.server.jobs import Exchange
from phicore.server.metrics import Metrics
from phicore.server.settings import Settings
from phicore.server.streams import GoneError, unless_gone
from phicore.server.worker import Worker

log = logging.getLogger(__name__)

CHUNK_S = 0.8
"""A prompt is read in parts of about this time, so that clients who go away are noticed soon."""
LONG_BODY = 100_000
"""A body of more bytes has long texts."""
BODIES = 32
"""No more bytes of bodies are on their way than so many of the largest have; short ones count, but
are always taken."""
QUICK = 16
"""Number of requests whose texts may be in work beside those that may run and wait."""
State = Literal["loading", "ready", "failed", "stopping"]


class Service:
    """A model that is served.

    Attributes:
        names: The names by which clients may call the model, the first one being its id.
        settings: The settings.
        metrics: What is counted.
        state: "loading" until the model is there, then "ready"; "failed" if it cannot be loaded or
            no longer computes; "stopping" when the server is about to end.
        failure: Why the state is "failed".
        created: When the service was made, in seconds since 1970.
        has_keys: Whether clients must send a key.
    """

    def __init__(
        self,
        model: Model | Callable[[], Model],
        names: Sequence[str],
        settings: Settings,
        failed: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """Prepare to serve.

        Args:
            model: The model, or a function that loads it.
            failed: Called if the model cannot be loaded, or no longer computes.
        """
        self.names = tuple(names)
        self.settings = settings
        self.metrics = Metrics(self.names[0])
        self.state: State = "loading"
        self.failure: BaseException | None = None
        self.created = int(time.time())
        self.has_keys = False
        self._model = model
        self._failed = failed
        self._worker: Worker | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._exchanges: WeakSet[Exchange] = WeakSet()
        self._watch = Watch(settings.plugin_limit, self._is_blocked)
        # Texts are split into tokens here, since a long one would keep all others waiting.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="phicore-text")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="phicore-long")
        self._preparing = 0
        self._receiving = 0  # bytes of bodies on their way

    # ---- life ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that loads the model and computes, unless it runs already."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="phicore-engine")
                self._thread.daemon = True  # a model that is being loaded must not keep the process
                self._thread.start()
                atexit.register(self.close)

    def _run(self) -> None:
        self._watch.start()
        try:
            if (worker := self._load()) is not None:
                worker.run()
        finally:
            self._watch.stop()

    def _load(self) -> Worker | None:
        """Load the model; return the worker that computes, or None if that is not to be."""
        try:
            given = self._model
            model = given if isinstance(given, Model) else given()
            for broken in model.broken_plugins:
                about = broken.name, broken.distribution, broken.reason
                log.warning("plugin %s of %s is left out: %s", *about)
            worker = Worker(
                model,
                most=self._most(model),
                watcher=self.metrics,
                died=self._has_failed,
                watch=self._watch,
            )
            if self.settings.warmup:
                warm_up(model)
            model.wait_until_loaded()
            model.engine.scheduler.chunk_s = CHUNK_S  # after the warm-up, which reads whole chunks
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is told
            self._has_failed(error)
            return None
        with self._lock:
            if self.state != "loading":
                return None
            self._worker, self.state = worker, "ready"
        fields = {
            "model": self.names[0],
            "backend": model.backend,
            "device": model.device,
            "context": model.context,
            "load_s": round(model.load_s, 1),
        }
        log.info("ready", extra={"fields": fields})
        return worker

    def _most(self, model: Model) -> int:
        return model.engine.scheduler.max_sequences + self.settings.max_queue

    def _has_failed(self, error: BaseException) -> None:
        self.failure, self.state = error, "failed"
        self._failed(error)

    def _is_blocked(self) -> None:
        """End all answers, since a plugin keeps them waiting; another thread calls this."""
        with self._lock:  # a set must not grow while somebody goes through it
            found = list(self._exchanges)
        for exchange in found:
            with suppress(RuntimeError):  # its event loop has ended
                exchange.loop.call_soon_threadsafe(exchange.fail, blocked())

    def check_not_blocked(self) -> None:
        """Check that no plugin keeps all answers waiting.

        Raises:
            ApiError: If one does.
        """
        if self._watch.blocker is not None:
            raise blocked()

    def begin_stop(self) -> None:
        """Let the service end: /health tells so, and what is under way goes on."""
        with self._lock:
            if self.state in ("loading", "ready"):
                self.state = "stopping"

    def end_all(self, error: ApiError) -> None:
        """End the answers that are under way because of an error."""
        for exchange in list(self._exchanges):
            exchange.fail(error)

    def close(self, wait_s: float = 10.0) -> None:
        """End the answers that are under way, and the thread."""
        atexit.unregister(self.close)
        self.begin_stop()
        if self._worker is not None:
            self._worker.stop()
            if self._thread is not None and self._thread is not threading.current_thread():
                self._thread.join(wait_s)
        for pool in (self._pool, self._long):
            pool.shutdown(wait=False, cancel_futures=True)

    @property
    def is_alive(self) -> bool:
        """Return whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    # ---- requests --------------------------------------------------------------------------

    @property
    def worker(self) -> Worker:
        """Return the thread that computes.

        Raises:
            ApiError: If it is not there yet, or no longer.
        """
        self.start()
        if self.state == "failed":
            raise ApiError("the model does not compute any more", status=500, code="server_error")
        if self._worker is None or self.state != "ready":
            raise loading() if self.state == "loading" else stopping()
        self.check_not_blocked()
        return self._worker

    @property
    def worker_or_none(self) -> Worker | None:
        """Return the thread that computes, if it was ever there."""
        return self._worker

    @property
    def model(self) -> Model:
        """Return the model.

        Raises:
            ApiError: If it is not there yet, or no longer.
        """
        return self.worker.model

    @cached_property
    def fingerprint(self) -> str:
        """Return a text that changes when the bits of the answers may change."""
        return f"fp_{self.model.fingerprint[:16]}"

    async def body(self, request: Request) -> dict[str, Any]:
        """Read the object in the body of a request.

        `request.state` then has `is_long`, whether its texts are long, and `end_s`, the time of the
        event loop at which the request is out of time.

        Raises:
            ApiError: If the body is too long, comes too slowly or is no object, or if it is long
                and others of which much has come are on their way.
        """
        request.state.end_s = asyncio.get_running_loop().time() + self.settings.time_limit
        most = self.settings.max_body
        too_large = ApiError(
            f"the body is too large; this server takes {most} bytes", status=413, code="too_large"
        )
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        found = bytearray()
        try:
            async with asyncio.timeout(self.settings.patience):
                async for part in request.stream():
                    found += part
                    self._receiving += len(part)
                    if len(found) > most:
                        raise too_large
                    if len(found) > LONG_BODY and self._receiving > BODIES * most:
                        raise crowded()
        except TimeoutError:
            raise ApiError("the body comes too slowly", status=408) from None
        except ClientDisconnect:
            raise GoneError from None
        finally:
            self._receiving -= len(found)
        request.state.is_long = len(found) > LONG_BODY
        body = parsed(bytes(found))
        if self.settings.log_text:
            log.info("body", extra={"fields": {"body": body}})
        return body

    def check_model(self, fields: Fields) -> str:
        """Return the name of the model that a request asks for; without one, the model's id.

        Raises:
            ApiError: If the model has another name.
        """
        name = fields.text("model")
        if name is None or name in self.names:
            return name or self.names[0]
        if self.settings.any_model:
            return name
        raise unknown_model(name, self.names)

    async def in_pool(
        self,
        request: Request,
        function: Callable[[], Any],
        spell: Callable[[str], str],
        *,
        is_long: bool = False,
    ) -> Any:
        """Call a function in a thread for work with text, for a request whose body was read.

        Functions that take long run one after the other, and others do not wait for them. If the
        client goes away before its function begins, it is not called.

        Args:
            spell: Returns the field of the request for a parameter in Python.
            is_long: Whether the function takes long; it also does if the body is long.
        Raises:
            ApiError: If the function raises an error of phicore, too many requests wait for theirs,
                the request is out of time, or the client has gone away.
        """
        model = self.model
        if self._preparing >= self._most(model) + QUICK:
            raise full(self._preparing)
        pool = self._long if is_long or request.state.is_long else self._pool
        self._preparing += 1
        try:
            async with asyncio.timeout_at(request.state.end_s):
                return await _called(pool, function, request)
        except TimeoutError:
            raise out_of_time() from None
        except ApiError:
            raise
        except TokenizerError as error:  # the file's name is of no use to a client
            problem = error.problem.removeprefix(f"{model.path.name}: ")
            raise wrong_field(spell("prompt"), problem) from error
        except Exception as error:
            found = api_error(error, spell, model.context)
            if found.status == 500:
                tell(log, "a request cannot be prepared", error)
            raise found from error
        finally:
            self._preparing -= 1

    def check_room(self) -> None:
        """Check that the queue has room, before a request costs anything.

        Raises:
            ApiError: If it is full, or the server is about to end.
        """
        worker = self.worker
        if worker.count >= self._most(worker.model):
            raise full(worker.count)

    def check_prompts(self, requests: Sequence[EngineRequest], field: str) -> None:
        """Check the lengths of prompts.

        Raises:
            ApiError: If one is too long.
        """
        context = self.model.context
        most = min(context - 1, self.settings.max_prompt or context)
        longest = max(len(request.prompt_ids) for request in requests)
        if longest >= context:
            raise too_long(longest, context, field)
        if longest > most:
            raise ApiError(
                f"{field}: {longest} tokens; this server takes {most}", param=field, code="too_long"
            )

    def exchange(
        self, request: Request, requests: Sequence[EngineRequest], spell: Callable[[str], str]
    ) -> Exchange:
        """Return an exchange for requests to the engine.

        Args:
            request: The client's request, whose body was read.
            spell: Returns the field of the request for a parameter in Python.
        """
        made = Exchange(requests, self.worker, end_s=request.state.end_s, spell=spell)
        with self._lock:
            self._exchanges.add(made)
        return made


async def _called(pool: ThreadPoolExecutor, function: Callable[[], Any], request: Request) -> Any:
    """Call a function in a pool, unless the client goes away before its turn comes."""
    turn = pool.submit(function)
    is_gone = False

    def gone() -> None:
        nonlocal is_gone
        is_gone = True
        turn.cancel()

    try:
        found = await unless_gone(request.receive, asyncio.wrap_future(turn), gone)
    except asyncio.CancelledError:
        if not is_gone:
            raise
    if is_gone:
        raise GoneError
    return found


def unknown_model(name: str, names: Sequence[str]) -> ApiError:
    """Return the error about a model that is not here."""
    known = ", ".join(names)
    return ApiError(
        f"The model `{name:.100}` does not exist; this server has {known} (with --any-model it "
        "answers to any name)",
        status=404,
        param="model",
        code="model_not_found",
    )


def warm_up(model: Model) -> None:
    """Compile what requests with the usual sampling parameters need, structured output included."""
    usual = model.sampling
    constrained = []
    if find_spec("llguidance") is not None and model.tokenizer.end_token_ids:
        constrained = list(model.request([0], json_schema=True).processors)
    model.engine.warm_up(
        [usual, replace(usual, temperature=0.0)], has_logprobs=True, processors=constrained
    )


def new_id(prefix: str) -> str:
    """Return an identifier that nobody else has."""
    return f"{prefix}-{uuid.uuid4().hex}"
