"""The fields that constrain an answer: OpenAI's `response_format`, and those of other servers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from phicore.server.errors import ApiError, wrong_field
from phicore.server.fields import Fields

Arguments = dict[str, Any]
"""Arguments of `Model.request`: json_schema, regex or grammar, or none."""


def format_of(fields: Fields) -> tuple[Arguments, str]:
    """Read what an answer must follow.

    Returns:
        The arguments of `Model.request`, and the field of the request that they come from.
    Raises:
        ApiError: If a field is wrong, if several fields constrain the answer, or if the server has
            no library for that.
    """
    found = [
        (arguments, name)
        for name, read in _FIELDS.items()
        if name in fields and (arguments := _arguments(read, fields, name))
    ]
    if not found:
        return {}, ""
    if len(found) > 1:
        raise wrong_field(found[1][1], f"give this field or {found[0][1]}, not both")
    if find_spec("llguidance") is None:
        raise ApiError(
            f"{found[0][1]}: this server lacks the package llguidance (phicore[grammar])",
            param=found[0][1],
            code="unsupported_parameter",
        )
    return found[0]


def _arguments(read: _Read, fields: Fields, name: str) -> Arguments:
    """Read a field; what is wrong inside of it is told of the field."""
    try:
        return read(fields, name)
    except ApiError as error:
        if error.param == name:
            raise
        raise wrong_field(name, error.problem) from error


def _response_format(fields: Fields, name: str) -> Arguments:
    given = Fields(fields.object(name) or {})
    kind = given.text("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": _schema(given, "schema") if "schema" in given else True}
    if kind == "json_schema":
        inner = given.object("json_schema")
        if inner is None:
            raise wrong_field(name, "json_schema: expected an object with a schema")
        return {"json_schema": _schema(Fields(inner), "schema")}
    raise wrong_field(name, "type: expected text, json_object or json_schema")


def _schema(given: Fields, name: str) -> Any:
    """Return a schema, an object or the text of one."""
    schema = given.get(name)
    if not isinstance(schema, (dict, str)):
        raise wrong_field(name, "expected a JSON schema")
    return schema


def _json(fields: Fields, name: str) -> Arguments:
    schema = fields.get(name)
    if schema in ({}, ""):
        return {}
    return {"json_schema": True if schema == "json" else _schema(fields, name)}


def _regex(fields: Fields, name: str) -> Arguments:
    return {"regex": text} if (text := fields.text(name)) else {}


def _grammar(fields: Fields, name: str) -> Arguments:
    return {"grammar": text} if (text := fields.text(name)) else {}


def _choice(fields: Fields, name: str) -> Arguments:
    texts = fields.texts(name, 1000)
    return {"regex": "|".join(map(re.escape, texts))} if texts else {}


def _structured(fields: Fields, name: str) -> Arguments:
    """Read vLLM's `structured_outputs`, an object with one of these fields."""
    given = Fields(fields.object(name) or {})
    if given.flag("json_object"):
        return {"json_schema": True}
    kinds: Mapping[str, _Read] = {
        "json": _json,
        "regex": _regex,
        "choice": _choice,
        "grammar": _grammar,
    }
    found = [arguments for n, read in kinds.items() if n in given and (arguments := read(given, n))]
    if len(found) > 1:
        raise wrong_field(name, "expected one of json, regex, choice and grammar")
    return found[0] if found else {}


_Read = Callable[[Fields, str], Arguments]
_FIELDS: Mapping[str, _Read] = {
    "response_format": _response_format,
    "structured_outputs": _structured,
    "guided_json": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
    "json_schema": _json,
    "grammar": _grammar,
    "format": _json,
}
"""The fields: OpenAI's, vLLM's (`structured_outputs` and the older `guided_...`), llama.cpp's
(`json_schema`, `grammar`), ollama's (`format`)."""
