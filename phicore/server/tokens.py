"""/tokenize, /detokenize and /apply-template, as llama-server and vLLM have them."""

from __future__ import annotations

import json

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from phicore.server.chat import messages_of
from phicore.server.errors import ApiError, wrong_field
from phicore.server.fields import Fields
from phicore.server.parameters import check_ids, refuse_unknown
from phicore.server.service import Service
from phicore.server.tools import FIELDS, tools_of


async def tokenize(service: Service, request: Request) -> Response:
    """Turn a text, or a conversation, into tokens."""
    fields = Fields(await service.body(request))
    model = service.model
    service.check_model(fields)
    name = fields.given("content", "prompt")
    if (name is None) == ("messages" not in fields):
        raise ApiError("expected content, prompt or messages", param="prompt", code="invalid_value")
    tokenizer = model.tokenizer
    adds = fields.given("add_special", "add_special_tokens")
    add_bos = fields.flag(adds) if adds is not None else False
    tools = tools_of(fields)["tools"]
    has_pieces, parses = fields.flag("with_pieces"), fields.flag("parse_special", True)

    def tokens() -> list[int]:
        if name is None:
            variables = fields.object("chat_template_kwargs")
            messages = messages_of(fields)
            return model.encode(messages, tools=tools, chat_template_kwargs=variables)
        text = fields.text(name) or ""
        return tokenizer.encode(
            text, add_bos=add_bos and tokenizer.bos_token_id is not None, parse_special=parses
        )

    def told(id: int) -> str:
        if not has_pieces:
            return str(id)
        token = {"id": id, "piece": _piece(tokenizer.token_bytes(id))}
        return json.dumps(token, ensure_ascii=False, separators=(",", ":"))

    def answer() -> Response:
        # Each token is written once: an object for each of millions would take gigabytes, and
        # writing them would keep all other clients waiting.
        ids = tokens()
        texts = {id: told(id) for id in set(ids)}
        listed = ",".join([texts[id] for id in ids])
        body = f'{{"tokens":[{listed}],"count":{len(ids)},"max_model_len":{model.context}}}'
        return Response(body, media_type="application/json")

    made: Response = await service.in_pool(
        request, answer, lambda parameter: name or _spelled(parameter)
    )
    return made


def _piece(data: bytes) -> str | list[int]:
    """Return the text of a token, or its bytes if they are no text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(service: Service, request: Request) -> Response:
    """Turn tokens into text."""
    fields = Fields(await service.body(request))
    model = service.model
    service.check_model(fields)
    tokens = fields.get("tokens")
    if tokens == []:
        return JSONResponse({"content": "", "prompt": ""})
    if not isinstance(tokens, list) or not all(type(id) is int for id in tokens):
        raise wrong_field("tokens", "expected a list of tokens' ids")
    check_ids("tokens", tokens, model.vocab_size)

    def answer() -> Response:
        found = model.tokenizer.decode(tokens, skip_special=False)
        return JSONResponse({"content": found, "prompt": found})

    made: Response = await service.in_pool(request, answer, lambda parameter: "tokens")
    return made


async def apply_template(service: Service, request: Request) -> Response:
    """Turn a conversation into the prompt that the model reads."""
    fields = Fields(await service.body(request))
    model = service.model
    service.check_model(fields)
    refuse_unknown(fields, FIELDS)
    messages, variables = messages_of(fields), fields.object("chat_template_kwargs")
    tools = tools_of(fields)["tools"]

    def rendered() -> str:
        return model.render(messages, tools=tools, chat_template_kwargs=variables)

    prompt = await service.in_pool(request, rendered, _spelled)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise wrong_field("messages", "half of a character: a lone surrogate") from None
    return JSONResponse({"prompt": prompt})


def _spelled(parameter: str) -> str:
    """Return the field of a request for a parameter of `Model.render`."""
    return parameter if parameter in FIELDS else "messages"
