"""Answers requests for completions: computes the choices, whole or as a stream of events."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from phicore.engine import Request as EngineRequest
from phicore.server.errors import wrong_field
from phicore.server.jobs import Exchange
from phicore.server.logprobs import Logprobs, joined
from phicore.server.parameters import Options
from phicore.server.service import Service, new_id
from phicore.server.shapes import Shape, usage
from phicore.server.streams import DONE, PING, EventStream, GoneError, event, unless_gone
from phicore.text.pieces import Piece

log = logging.getLogger(__name__)

Echo = tuple[str, dict[str, Any] | None]
"""The text with which a choice begins, and its log probabilities."""


class Answering:
    """The answer to one request for completions.

    Args:
        service: What is served.
        shape: How the answer looks.
        options: What the request asks for.
        model_name: The name of the model, as the client gave it.
        field: The field of the request that has the prompt.
        logprobs: Makes the log probabilities of each choice; empty if nobody asks for them.
        echoes: For each prompt, the text and the log probabilities with which its choices begin.
    """

    def __init__(
        self,
        service: Service,
        shape: Shape,
        options: Options,
        model_name: str,
        field: str,
        logprobs: Sequence[Logprobs] = (),
        echoes: Sequence[Echo] = (),
    ) -> None:
        self._service = service
        self._shape = shape
        self._options = options
        self._field = field
        self._logprobs = logprobs
        self._echoes = echoes
        self._base = {
            "id": new_id(shape.prefix),
            "created": int(time.time()),
            "model": model_name,
            "system_fingerprint": service.fingerprint,
        }

    async def respond(self, request: Request, requests: Sequence[EngineRequest]) -> Response:
        """Compute the answers.

        Args:
            requests: The requests to the engine, the choices of a prompt after each other.
        Raises:
            ApiError: If no answer, or no whole answer, can be computed.
        """
        exchange = self._service.exchange(request, requests, self._spell)

        def gone() -> None:
            exchange.fail(GoneError())

        try:
            # The engine refuses a request before anything is sent, so the status can tell it.
            await unless_gone(request.receive, exchange.begin(), gone)
            if self._options.stream:
                return EventStream(
                    self._events(exchange),
                    on_gone=gone,
                    patience_s=self._service.settings.patience,
                    log=lambda error: log.info("stream: %s", error),
                )
            return JSONResponse(await unless_gone(request.receive, self._whole(exchange), gone))
        except BaseException:
            exchange.close()
            raise

    def echoed(self, requests: Sequence[EngineRequest]) -> Response:
        """Return the prompts as the answers, for requests for no tokens.

        Raises:
            ApiError: If the client wants a stream.
        """
        if self._options.stream:
            raise wrong_field(self._options.max_tokens, "0 is not for a stream")
        choices = []
        for index, request in enumerate(requests):
            about = {"index": index, "finish_reason": "length", "seed": request.seed}
            choices.append({**about, **self._shape.choice(index, *self._echo(index))})
        prompt = sum(len(request.prompt_ids) for request in requests[:: self._options.choices])
        usage = {"prompt_tokens": prompt, "completion_tokens": 0, "total_tokens": prompt}
        body = {**self._base, "object": self._shape.whole, "choices": choices, "usage": usage}
        return JSONResponse(body)

    async def _whole(self, exchange: Exchange) -> dict[str, Any]:
        found: list[list[Piece]] = [[] for _ in exchange.jobs]
        async for index, pieces in exchange.pieces(self._service.settings.ping):
            if index >= 0:
                found[index] += pieces
        exchange.close()
        choices = []
        for index, pieces in enumerate(found):
            echo, before = self._echo(index)
            logprobs = self._told(index, pieces)
            choice = self._shape.choice(
                index,
                echo + "".join(piece.text for piece in pieces),
                logprobs if before is None else joined([before, logprobs]),
            )
            reason = self._shape.reason(index, pieces[-1].finish_reason or "", choice)
            about = self._about(exchange, index, reason)
            choices.append({**about, **choice})
        return {
            **self._base,
            "object": self._shape.whole,
            "choices": choices,
            "usage": self._usage(exchange),
        }

    async def _events(self, exchange: Exchange) -> AsyncIterator[bytes]:
        shape = self._shape
        base = {**self._base, "object": shape.chunk}
        if self._options.has_usage:
            base["usage"] = None

        def chunk(index: int, part: dict[str, Any], reason: str | None = None) -> bytes:
            return event({**base, "choices": [{**self._about(exchange, index, reason), **part}]})

        try:
            for index in range(len(exchange.jobs)):
                if (first := shape.first()) is not None:
                    yield chunk(index, first)
                echo, before = self._echo(index)
                for part in shape.parts(index, echo, before, is_last=False):
                    yield chunk(index, part)
            async for index, pieces in exchange.pieces(self._service.settings.ping):
                if index < 0:
                    yield PING
                    continue
                text = "".join(piece.text for piece in pieces)
                logprobs = self._told(index, pieces)
                reason = pieces[-1].finish_reason
                for part in shape.parts(index, text, logprobs, is_last=reason is not None):
                    yield chunk(index, part)
                if reason is not None:
                    yield chunk(index, shape.end(), shape.reason(index, reason, None))
            if self._options.has_usage:
                yield event({**base, "choices": [], "usage": self._usage(exchange)})
            yield DONE
        finally:
            exchange.close()

    def _about(self, exchange: Exchange, index: int, reason: str | None) -> dict[str, Any]:
        """Return what all choices have."""
        return {
            "index": index,
            "finish_reason": reason,
            "seed": exchange.jobs[index].request.seed,
        }

    def _usage(self, exchange: Exchange) -> dict[str, Any]:
        return usage(exchange.jobs, exchange.jobs[:: self._options.choices])

    def _echo(self, index: int) -> Echo:
        return self._echoes[index // self._options.choices] if self._echoes else ("", None)

    def _told(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        return self._logprobs[index].part(pieces) if self._logprobs else None

    def _spell(self, parameter: str) -> str:
        return self._options.spelled(parameter, self._field)
