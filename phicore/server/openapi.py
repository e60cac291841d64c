"""The OpenAPI description of the server, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from phicore.engine.request import MOST_LOGPROBS
from phicore.server.parameters import LONGEST_STOP, MOST_CHOICES, MOST_STOPS
from phicore.tools.choices import MOST_TOOLS

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
IDS: Schema = {"type": "array", "items": COUNT}


def _or_null(schema: Schema, about: str = "") -> Schema:
    """Return the schema of a field that may be null, which counts as absent."""
    found: Schema = {"anyOf": [schema, {"type": "null"}]}
    return {**found, "description": about} if about else found


def _number(least: float, most: float, about: str = "") -> Schema:
    return _or_null({"type": "number", "minimum": least, "maximum": most}, about)


def _integer(least: int, most: int, about: str = "") -> Schema:
    return _or_null({"type": "integer", "minimum": least, "maximum": most}, about)


def _object(required: Sequence[str], properties: Mapping[str, Schema], **more: Any) -> Schema:
    found = {"type": "object", "properties": dict(properties), **more}
    return {**found, "required": list(required)} if required else found


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_MAX_TOKENS = _integer(
    -1, 2**63 - 1, "The largest number of tokens of an answer; -1 is what the context holds."
)
_SCHEMA: Schema = {"type": "object", "description": "A JSON schema."}
_STOP: Schema = {**TEXT, "minLength": 1, "maxLength": LONGEST_STOP}
_TEXT_PART = _object(["type", "text"], {"type": {"const": "text"}, "text": TEXT})
_COMMON: dict[str, Schema] = {
    "model": _or_null(_ref("ModelName")),
    "stream": _or_null(FLAG, "Whether the answer comes as server-sent events."),
    "stream_options": _or_null(_object([], {"include_usage": _or_null(FLAG)})),
    "n": _integer(1, MOST_CHOICES, "Number of answers. Each has a seed of its own."),
    "max_tokens": _MAX_TOKENS,
    "max_completion_tokens": _MAX_TOKENS,
    "seed": _integer(-(2**63), 2**64 - 1, "Taken modulo 2**64. The same seed gives the same text."),
    "temperature": _number(0, 1e6, "0 takes the most probable token."),
    "top_p": _number(0, 1),
    "top_k": _integer(-1, 2**31 - 1, "0 and -1 keep all tokens."),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(1e-6, 1e6),
    "repeat_last_n": _integer(-1, 2**31 - 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _or_null(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        "A bias for each token's id.",
    ),
    "stop": _or_null(
        {"anyOf": [_STOP, _list(_STOP, maxItems=MOST_STOPS)]},
        "Strings that end the text; they are no part of it.",
    ),
    "response_format": _or_null(
        {
            "anyOf": [
                _object(["type"], {"type": {"const": "text"}}),
                _object(["type"], {"type": {"const": "json_object"}, "schema": _SCHEMA}),
                _object(
                    ["type", "json_schema"],
                    {
                        "type": {"const": "json_schema"},
                        "json_schema": _object(
                            ["schema"], {"name": TEXT, "schema": _SCHEMA, "strict": FLAG}
                        ),
                    },
                ),
            ]
        },
        "What the answer follows. A schema that cannot be honoured is an error.",
    ),
    "stop_token_ids": _or_null(IDS),
    "ignore_eos": _or_null(FLAG),
    "speculation": _or_null(FLAG, "Whether tokens may be guessed; the text stays the same."),
    "prediction": _or_null(
        _object(
            ["type", "content"],
            {"type": {"const": "content"}, "content": {"anyOf": [TEXT, _list(_TEXT_PART)]}},
        ),
        "A text that the answer is thought to resemble; where it does, it comes faster.",
    ),
}
_PART: Schema = {
    "anyOf": [
        _object(["type", "text"], {"type": {"enum": ["text", "input_text"]}, "text": TEXT}),
        _object(["type", "refusal"], {"type": {"const": "refusal"}, "refusal": TEXT}),
    ]
}
_ARGUMENTS: Schema = {**TEXT, "description": "The text of a JSON object."}
_FUNCTION_NAME = _object(["name"], {"name": {**TEXT, "minLength": 1}})
_ALLOWED = _object(
    ["tools"],
    {
        "mode": {"enum": ["auto", "required"]},
        "tools": _list(
            _object(
                ["type", "function"], {"type": {"const": "function"}, "function": _FUNCTION_NAME}
            ),
            minItems=1,
        ),
    },
)
_TOOLS = _or_null(_list(_ref("Tool"), maxItems=MOST_TOOLS), "Functions that the model may call.")
_ROLE: Schema = {**TEXT, "examples": ["system", "user", "assistant", "tool"]}
_SCHEMAS: dict[str, Schema] = {
    "Tool": _object(
        ["function"],
        {
            "type": {"const": "function"},
            "function": _object(
                ["name"],
                {
                    "name": {**TEXT, "minLength": 1},
                    "description": _or_null(TEXT),
                    "parameters": _or_null(
                        {"type": "object"}, "The JSON schema of the arguments, an object's."
                    ),
                    "strict": _or_null(
                        FLAG, "Whether the arguments must follow the schema in any case."
                    ),
                },
            ),
        },
    ),
    "EarlierCall": _object(
        ["function"],
        {
            "id": _or_null(TEXT),
            "type": _or_null({"const": "function"}),
            "function": _object(
                ["name"],
                {
                    "name": TEXT,
                    "arguments": {"anyOf": [_ARGUMENTS, {"type": "object"}, {"type": "null"}]},
                },
            ),
        },
    ),
    "ToolCall": _object(
        ["id", "type", "function"],
        {
            "id": TEXT,
            "type": {"const": "function"},
            "function": _object(
                ["name", "arguments"],
                {"name": TEXT, "arguments": _ARGUMENTS},
            ),
        },
    ),
    "Message": {
        "anyOf": [
            _object(
                ["role", "content"],
                {"role": _ROLE, "content": {"anyOf": [TEXT, _list(_PART)]}},
            ),
            _object(
                ["role", "tool_calls"],
                {"role": _ROLE, "tool_calls": _list(_ref("EarlierCall"), minItems=1)},
            ),
        ]
    },
    "ChatRequest": _object(
        ["messages"],
        {
            "messages": _list(_ref("Message"), minItems=1),
            **_COMMON,
            "tools": _TOOLS,
            "tool_choice": _or_null(
                {
                    "anyOf": [
                        {"enum": ["none", "auto", "required"]},
                        _object(
                            ["type", "function"],
                            {"type": {"const": "function"}, "function": _FUNCTION_NAME},
                        ),
                        _object(
                            ["type", "allowed_tools"],
                            {"type": {"const": "allowed_tools"}, "allowed_tools": _ALLOWED},
                        ),
                    ]
                },
                "Whether the answer calls tools; a call that is required is forced by a grammar.",
            ),
            "parallel_tool_calls": _or_null(FLAG, "Whether an answer may have several calls."),
            "logprobs": _or_null(FLAG),
            "top_logprobs": _integer(0, MOST_LOGPROBS),
            "chat_template_kwargs": _or_null({"type": "object"}),
        },
    ),
    "TextRequest": _object(
        ["prompt"],
        {
            "prompt": {
                "anyOf": [
                    TEXT,
                    _list(TEXT, minItems=1),
                    {**IDS, "minItems": 1},
                    _list({**IDS, "minItems": 1}, minItems=1),
                ]
            },
            **_COMMON,
            "logprobs": _integer(0, MOST_LOGPROBS),
            "echo": _or_null(FLAG),
        },
    ),
    "TokenizeRequest": _object(
        [],
        {
            "model": _or_null(_ref("ModelName")),
            "content": _or_null(TEXT, "The text; prompt is the same."),
            "prompt": _or_null(TEXT),
            "messages": _or_null(_list(_ref("Message"), minItems=1), "A conversation instead."),
            "tools": _TOOLS,
            "add_special": _or_null(FLAG, "Whether the tokens begin with BOS."),
            "parse_special": _or_null(FLAG),
            "with_pieces": _or_null(FLAG),
        },
    ),
    "DetokenizeRequest": _object(["tokens"], {"model": _or_null(_ref("ModelName")), "tokens": IDS}),
    "TemplateRequest": _object(
        ["messages"],
        {
            "model": _or_null(_ref("ModelName")),
            "messages": _list(_ref("Message"), minItems=1),
            "tools": _TOOLS,
            "chat_template_kwargs": _or_null({"type": "object"}),
        },
    ),
    "Usage": _object(
        ["prompt_tokens", "completion_tokens", "total_tokens"],
        {
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "prompt_tokens_details": _object(["cached_tokens"], {"cached_tokens": COUNT}),
            "completion_tokens_details": _object(
                ["accepted_prediction_tokens", "rejected_prediction_tokens"],
                {"accepted_prediction_tokens": COUNT, "rejected_prediction_tokens": COUNT},
            ),
            "timings": {
                "type": "object",
                "additionalProperties": {"type": "number"},
                "description": "Times of the first answer, with llama-server's names.",
            },
        },
    ),
    "Error": _object(
        ["error"],
        {
            "error": _object(
                ["message", "type", "param", "code"],
                {
                    "message": TEXT,
                    "type": TEXT,
                    "param": _or_null(TEXT),
                    "code": _or_null(TEXT),
                },
            )
        },
    ),
    "Model": _object(
        ["id", "object", "created", "owned_by"],
        {
            "id": TEXT,
            "object": {"const": "model"},
            "created": COUNT,
            "owned_by": TEXT,
            "max_model_len": COUNT,
            "meta": {"type": "object"},
        },
    ),
}


def _completion(kind: str, choice: Mapping[str, Schema]) -> Schema:
    """Return the schema of a whole answer."""
    choice = {
        "index": COUNT,
        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
        "seed": COUNT,
        "logprobs": _or_null({"type": "object"}),
        **choice,
    }
    required = ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
    return _object(
        required,
        {
            "id": TEXT,
            "object": {"const": kind},
            "created": COUNT,
            "model": TEXT,
            "system_fingerprint": TEXT,
            "choices": _list(_object(list(choice), choice), minItems=1),
            "usage": _ref("Usage"),
        },
    )


_MESSAGE = _object(
    ["role", "content", "refusal"],
    {
        "role": {"const": "assistant"},
        "content": _or_null(TEXT),
        "refusal": {"type": "null"},
        "tool_calls": _list(_ref("ToolCall"), minItems=1),
    },
)
_SCHEMAS["ChatCompletion"] = _completion("chat.completion", {"message": _MESSAGE})
_SCHEMAS["TextCompletion"] = _completion("text_completion", {"text": TEXT})

_PROBLEMS = {
    "400": "A field is wrong, or cannot be honoured; param names it.",
    "401": "The key is missing or wrong.",
    "403": "The host or the origin is not allowed.",
    "404": "There is no such model.",
    "408": "The request came too slowly.",
    "413": "The body is too large.",
    "500": "A fault of the server.",
    "503": "The model is being loaded, the queue is full, or the server is about to end.",
    "504": "The request took too long.",
}
"""The errors, and when they occur."""


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _responses(good: Schema, *problems: str) -> Schema:
    found = {"200": {"description": "The answer.", "content": good}}
    return {
        **found,
        **{
            status: {"description": _PROBLEMS[status], "content": _json(_ref("Error"))}
            for status in problems
        },
    }


def _post(about: str, body: str, good: Schema) -> Schema:
    return {
        "post": {
            "summary": about,
            "requestBody": {"required": True, "content": _json(_ref(body))},
            "responses": _responses(good, *_PROBLEMS),
        }
    }


def _get(about: str, good: Schema, *problems: str, **more: Any) -> Schema:
    found = _responses(good, *problems)
    return {"get": {"summary": about, "responses": found, **more}}


# `itemSchema`, of OpenAPI 3.2, describes each event; programs for 3.1 ignore it.
_EVENTS = {"text/event-stream": {"itemSchema": _object(["data"], {"data": TEXT})}}
_TOKEN = _object(["id", "piece"], {"id": COUNT, "piece": {"anyOf": [TEXT, IDS]}})
_CHAT = _post("Answer a conversation.", "ChatRequest", {**_json(_ref("ChatCompletion")), **_EVENTS})
_TEXT = _post("Continue texts.", "TextRequest", {**_json(_ref("TextCompletion")), **_EVENTS})
_MODELS = _get(
    "List the model's names.",
    _json(_object(["object", "data"], {"object": {"const": "list"}, "data": _list(_ref("Model"))})),
    "401",
    "403",
)
_ONE_MODEL = _get(
    "Describe the model.",
    _json(_ref("Model")),
    "401",
    "403",
    "404",
    parameters=[{"name": "id", "in": "path", "required": True, "schema": TEXT}],
)
_PATHS: dict[str, Schema] = {
    "/v1/chat/completions": _CHAT,
    "/chat/completions": _CHAT,
    "/v1/completions": _TEXT,
    "/completions": _TEXT,
    "/v1/models": _MODELS,
    "/models": _MODELS,
    "/v1/models/{id}": _ONE_MODEL,
    "/models/{id}": _ONE_MODEL,
    "/tokenize": _post(
        "Turn a text or a conversation into tokens.",
        "TokenizeRequest",
        _json(
            _object(
                ["tokens", "count", "max_model_len"],
                {
                    "tokens": _list({"anyOf": [COUNT, _TOKEN]}),
                    "count": COUNT,
                    "max_model_len": COUNT,
                },
            )
        ),
    ),
    "/detokenize": _post(
        "Turn tokens into text.",
        "DetokenizeRequest",
        _json(_object(["content", "prompt"], {"content": TEXT, "prompt": TEXT})),
    ),
    "/apply-template": _post(
        "Turn a conversation into the prompt that the model reads.",
        "TemplateRequest",
        _json(_object(["prompt"], {"prompt": TEXT})),
    ),
    "/health": _get(
        "Tell whether the server can answer.",
        _json(_object(["status"], {"status": {"const": "ok"}})),
        "403",
        "500",
        "503",
        security=[],
    ),
    "/metrics": _get(
        "Metrics in Prometheus' format.", {"text/plain": {"schema": TEXT}}, "401", "403"
    ),
    "/openapi.json": _get("This description.", _json({"type": "object"}), "403", security=[]),
}


def description(names: Sequence[str] | None, *, has_keys: bool) -> dict[str, Any]:
    """Return the description.

    Args:
        names: The names of the model; None means that any name is taken.
        has_keys: Whether clients must send a key.
    """
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    name = {**TEXT, "description": "The model's id or an alias."}
    if names is not None:
        name["enum"] = list(names)
    components: dict[str, Any] = {"schemas": {**_SCHEMAS, "ModelName": name}}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "phicore",
            "version": version("phicore"),
            "description": "OpenAI's API over a model that phicore runs.",
        },
        "paths": _PATHS,
        "components": components,
    }
    if has_keys:
        components["securitySchemes"] = schemes
        found["security"] = [{name: []} for name in schemes]
    return found
