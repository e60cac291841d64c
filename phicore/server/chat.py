"""/v1/chat/completions."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from phicore.engine import Request as EngineRequest
from phicore.engine.request import MOST_LOGPROBS
from phicore.server.answers import Answering
from phicore.server.errors import ApiError, wrong_field
from phicore.server.fields import Fields
from phicore.server.logprobs import ChatLogprobs
from phicore.server.parameters import Options, options_of
from phicore.server.service import Service
from phicore.server.shapes import ChatShape
from phicore.server.tools import FIELDS, ToolReader, tools_of

MOST_MESSAGES = 4096
"""The largest number of messages and their parts together; templates take long for more."""
_TEXT_PARTS = ("text", "input_text", "refusal")


async def chat(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    fields = Fields(await service.body(request))
    model = service.model
    name = service.check_model(fields)
    messages = messages_of(fields)
    options = options_of(
        fields,
        default_tokens=-1,
        most_tokens=service.settings.max_answer,
        vocab_size=model.vocab_size,
        honoured=FIELDS,
    )
    tools = tools_of(fields)
    count = _logprobs_of(fields)
    variables = fields.object("chat_template_kwargs")
    documents = fields.get("documents")
    service.check_room()

    def prepared() -> list[EngineRequest]:
        return options.requests(
            model,
            messages,
            documents=documents,
            chat_template_kwargs=variables,
            logprobs=count,
            **tools,
        )

    spell = partial(Options.spelled, options, prompt="messages")
    requests = await service.in_pool(request, prepared, spell)
    service.check_prompts(requests, "messages")
    logprobs = [] if count is None else [ChatLogprobs(model.tokenizer) for _ in requests]
    shape = ChatShape([ToolReader(each) for each in requests])
    answering = Answering(service, shape, options, name, "messages", logprobs)
    return await answering.respond(request, requests)


def _logprobs_of(fields: Fields) -> int | None:
    """Read how many alternatives to tell for each token; None tells no log probabilities."""
    most = fields.integer("top_logprobs", 0, MOST_LOGPROBS)
    if fields.flag("logprobs"):
        return most or 0
    if most:
        raise wrong_field("top_logprobs", "only together with logprobs")
    return None


def messages_of(fields: Fields) -> list[dict[str, Any]]:
    """Read the messages of a conversation.

    Raises:
        ApiError: If they are none that a model of texts can read.
    """
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong_field("messages", "expected a list of messages")
    parts = [m.get("content") for m in messages if isinstance(m, dict)]
    count = len(messages) + sum(len(part) for part in parts if isinstance(part, list))
    if count > MOST_MESSAGES:
        raise wrong_field("messages", f"expected at most {MOST_MESSAGES} messages and parts")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _wrong(f"{where}: expected an object with role and content")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _wrong(f"{where}.tool_calls: expected a list of objects")
    content = message.get("content")
    if content is None:
        if not any(message.get(key) for key in ("tool_calls", "function_call", "refusal")):
            raise _wrong(f"{where}.content: expected a text or a list of parts")
        return message
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise _wrong(f"{where}.content: expected a text or a list of parts")
    parts = [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]
    return {**message, "content": parts}


def _part(part: Any, where: str) -> dict[str, Any]:
    """Return a part of a message; it must be a text."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS:
        raise _wrong(f"{where}: this model reads texts; expected a part of type text")
    text = part.get("refusal" if kind == "refusal" else "text")
    if not isinstance(text, str):
        raise _wrong(f"{where}.text: expected a text")
    return {"type": "text", "text": text}


def _wrong(message: str) -> ApiError:
    return ApiError(message, param="messages", code="invalid_value")
