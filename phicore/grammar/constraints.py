"""What an answer may be: a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from phicore.errors import ArgumentError
from phicore.extras import library
from phicore.grammar.schemas import closed, schema_of

JSON_SCHEMA, REGEX, GRAMMAR = "json_schema", "regex", "grammar"
NAMES = JSON_SCHEMA, REGEX, GRAMMAR
"""The parameters of `Model.generate` that constrain an answer, at most one of which is given."""
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
"""JSON without white space between its parts: a small model would write spaces for ever."""
ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Constraint:
    """What an answer may be.

    Attributes:
        name: The parameter that it comes from, one of `NAMES`.
        grammar: The grammar in llguidance's own form.
    """

    name: str
    grammar: str


def constraint_of(
    *, json_schema: Any = None, regex: str | None = None, grammar: str | None = None
) -> Constraint | None:
    """Make the constraint that one of the arguments describes; None if none of them is given.

    Args:
        json_schema: A JSON schema as a dictionary or as text; True for any JSON object; or a class
            that `schema_of` takes.
        regex: A regular expression, which the whole answer matches.
        grammar: A grammar in the form of Lark or of GBNF.
    Raises:
        ArgumentError: If several are given, or one is of the wrong type or form. Whether a grammar
            can be honoured is only known to `Vocabulary.check`.
    """
    values = {JSON_SCHEMA: json_schema, REGEX: regex, GRAMMAR: grammar}
    given = [name for name, value in values.items() if value is not None and value is not False]
    if not given:
        return None
    if len(given) > 1:
        raise ArgumentError(f"not together with {given[1]}", parameter=given[0])
    name = given[0]
    make: Callable[[Any], str] = {JSON_SCHEMA: _json, REGEX: _regex, GRAMMAR: _grammar}[name]
    return Constraint(name, make(values[name]))


def matcher_class() -> Any:
    """Return llguidance's `LLMatcher`.

    Raises:
        PhicoreError: If the library is not installed.
    """
    return library("llguidance", "json_schema, regex and grammar").LLMatcher


def _json(schema: Any) -> str:
    if schema is True:
        schema = ANY_OBJECT
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ArgumentError(f"not JSON: {error}", parameter=JSON_SCHEMA) from error
    elif not isinstance(schema, Mapping):
        schema = schema_of(schema)
    if not isinstance(schema, Mapping):
        raise ArgumentError(parameter=JSON_SCHEMA, expected="a JSON object", got=schema)
    try:
        text = json.dumps(closed(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"not JSON: {error}", parameter=JSON_SCHEMA) from error
    try:
        made: str = matcher_class().grammar_from_json_schema(text, overrides=COMPACT)
    except ValueError as error:
        raise ArgumentError(in_a_line(str(error)), parameter=JSON_SCHEMA) from error
    return made


def _regex(pattern: Any) -> str:
    if not isinstance(pattern, str):
        raise ArgumentError(parameter=REGEX, expected="a text", got=pattern)
    made: str = matcher_class().grammar_from_regex(pattern)
    return made


def _grammar(text: Any) -> str:
    if not isinstance(text, str):
        raise ArgumentError(parameter=GRAMMAR, expected="a text", got=text)
    matcher = matcher_class()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark = any_to_lark(text)
    except Exception as error:  # the converter raises plain exceptions
        raise ArgumentError(in_a_line(str(error)), parameter=GRAMMAR) from error
    made: str = matcher.grammar_from_lark(lark)
    return made


def in_a_line(message: str) -> str:
    """Return a message of the library, which may have several lines, as one line."""
    return " ".join(message.split())
