"""Errors as OpenAI's API tells them: an object with message, type, param and code, and a status."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from phicore.errors import (
    ArgumentError,
    BusyError,
    ContextError,
    PhicoreError,
    TokenizerError,
)

RETRY_AFTER_S = 2
"""After how many seconds a client may try again."""
LONGEST_MESSAGE = 1000
"""The largest number of characters that are taken of a message, which may quote a request."""

_TYPES: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    499: "client_closed_request",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(PhicoreError):
    """An error with a status of HTTP.

    Args:
        message: What is wrong, and what to do. It becomes a line without control characters.
        status: The status.
        param: The field of the request that is wrong.
        code: A word for programs, such as "context_length_exceeded".
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(escaped(message[:LONGEST_MESSAGE]))
        self.status = status
        self.param = None if param is None else escaped(param[:LONGEST_MESSAGE])
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """Return the object that a client gets."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.problem, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the answer."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status == 503 else {}


def escaped(text: str) -> str:
    """Return a text with line breaks and other control characters spelled as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def wrong_field(name: str, problem: str) -> ApiError:
    """Return the error about a field of a request."""
    return ApiError(f"{name}: {problem}", param=name, code="invalid_value")


def loading() -> ApiError:
    """Return the error of a server whose model is not there yet."""
    return ApiError("Loading model", status=503, code="model_loading")


def stopping() -> ApiError:
    """Return the error of a server that is about to end."""
    return ApiError("the server is shutting down", status=503, code="shutting_down")


def full(count: int) -> ApiError:
    """Return the error of a server that has so many requests that it takes no more."""
    problem = f"{count} requests run or wait already; try again later"
    return ApiError(problem, status=503, code="queue_full")


def crowded() -> ApiError:
    """Return the error of a server to which so much is being sent that it takes no long body."""
    problem = "too many long requests are being sent to this server; try again later"
    return ApiError(problem, status=503, code="queue_full")


def out_of_time() -> ApiError:
    """Return the error about a request that takes longer than `--time-limit`."""
    return ApiError("the request took longer than the server allows", status=504)


def blocked() -> ApiError:
    """Return the error of a server in which a plugin does not return."""
    problem = "a plugin of this server does not return; the server's log names it"
    return ApiError(problem, status=503, code="plugin_blocks")


def too_long(tokens: int, context: int, field: str) -> ApiError:
    """Return the error about a prompt that the context cannot hold, in OpenAI's words.

    Programs look for the beginning of the sentence.
    """
    return ApiError(
        f"This model's maximum context length is {context} tokens. However, your {field} resulted "
        f"in {tokens} tokens. Please reduce the length of the {field}.",
        param=field,
        code="context_length_exceeded",
    )


def api_error(
    error: BaseException, spell: Callable[[str], str] = str, context: int | None = None
) -> ApiError:
    """Return the error that a client gets for an error of phicore.

    Args:
        spell: Returns the field of the request for a parameter in Python.
        context: The number of tokens that the model's context holds.
    """
    match error:
        case ApiError():
            return error
        case ContextError() if context is not None and isinstance(error.got, int):
            return too_long(error.got, context, spell("prompt"))
        case ContextError():
            return ApiError(error.problem, code="context_length_exceeded")
        case BusyError():
            return ApiError(error.problem, status=503, code="queue_full")
        case ArgumentError():
            param = None if error.parameter is None else spell(error.parameter)
            return ApiError(error.worded(spell), param=param, code="invalid_value")
        case TokenizerError():
            return wrong_field(spell("prompt"), error.problem)
        case PhicoreError():
            return ApiError(error.worded(spell), status=500, code="server_error")
        case MemoryError():
            return ApiError("the server has not enough memory", status=503, code="no_memory")
        case _:
            return ApiError(
                "an error inside of the server; its log has the request's id",
                status=500,
                code="server_error",
            )
