"""What an answer may be: a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
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
MOST_TEXT = 2**18
"""The largest number of characters of a schema as JSON, an expression or a grammar."""
MOST_RULES = 1000
"""The largest number of rules of a grammar; the times of both libraries grow with its square."""
MOST_MULTIPLE = 10_000
"""The largest `multipleOf`: llguidance makes a state of each remainder, and none of its limits
holds for that. Where a schema has parts that hold at once, it is the largest product of all."""
MOST_PROPERTIES = 2000
"""The largest number of properties of an object; of several, the squares are added, since the time
of the library grows with them."""
LONGEST_MESSAGE = 400
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Lets llguidance not look for what must come next: for `start: /a+/ /a+/`, whose first part takes
every a, it would look for ever, and none of its limits holds for that. The last option counts."""
_RULE = re.compile(r"::=|^[ \t]*[!?]?[\w.-]+(?:\[[^\]\n]*\]|\{[^}\n]*\})?[ \t]*:", re.MULTILINE)
"""The beginning of a rule of GBNF or of Lark."""


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
        except RecursionError as error:
            raise ArgumentError("it is nested too deeply", parameter=JSON_SCHEMA) from error
        except ValueError as error:
            raise ArgumentError(f"not JSON: {error}", parameter=JSON_SCHEMA) from error
    elif not isinstance(schema, Mapping):
        schema = schema_of(schema)
    if not isinstance(schema, Mapping):
        raise ArgumentError(parameter=JSON_SCHEMA, expected="a JSON object", got=schema)
    text = schema_text(schema, JSON_SCHEMA)
    try:
        made: str = matcher_class().grammar_from_json_schema(text, overrides=COMPACT)
    except ValueError as error:
        raise ArgumentError(in_a_line(str(error)), parameter=JSON_SCHEMA) from error
    return made


def schema_text(schema: Mapping[str, Any], parameter: str) -> str:
    """Return a schema as JSON, closed as `closed` says.

    Raises:
        ArgumentError: If it is not JSON, or larger or deeper than a schema may be.
    """
    try:
        text = json.dumps(closed(schema))
    except RecursionError as error:
        raise ArgumentError("it is nested too deeply", parameter=parameter) from error
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"not JSON: {in_a_line(str(error))}", parameter=parameter) from error
    check_text(text, parameter)
    check_costs(schema, parameter)
    return text


def check_text(text: Any, parameter: str) -> None:
    """Check the text of a constraint.

    Raises:
        ArgumentError: If it is no text, too long, or has half of a character.
    """
    if not isinstance(text, str):
        raise ArgumentError(parameter=parameter, expected="a text", got=text)
    if len(text) > MOST_TEXT:
        expected = f"at most {MOST_TEXT} characters"
        raise ArgumentError(f"expected {expected}, got {len(text)}", parameter=parameter)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = "it has half of a character, a lone surrogate"
        raise ArgumentError(problem, parameter=parameter) from error


def check_costs(schema: Any, parameter: str) -> None:
    """Check what the limits of llguidance do not bound: `multipleOf`, and properties.

    Raises:
        ArgumentError: If a number is too large, or objects have too many properties.
    """
    multiples: list[int] = []
    pairs = 0
    are_joined = False
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, Mapping):
            are_joined |= "allOf" in part or "$ref" in part
            pairs += len(names) ** 2 if isinstance(names := part.get("properties"), Mapping) else 0
            value = part.get("multipleOf")
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                value = 0
            if value and math.isfinite(value):
                # The library counts in units of the last digit that is not 0.
                digits = Decimal(str(value)).normalize().as_tuple().digits
                multiples.append(int("".join(map(str, digits))))
            left += part.values()
        elif isinstance(part, (list, tuple)):
            left += part
    if pairs > MOST_PROPERTIES**2:
        raise ArgumentError(
            f"expected objects with at most {MOST_PROPERTIES} properties", parameter=parameter
        )
    found = math.prod(multiples) if are_joined else max(multiples, default=1)
    if found > MOST_MULTIPLE:
        raise ArgumentError(
            f"multipleOf: {min(found, 10**20)} has too many digits; expected at most "
            f"{MOST_MULTIPLE}, for the product of all if the schema has allOf or $ref",
            parameter=parameter,
        )


def _regex(pattern: Any) -> str:
    check_text(pattern, REGEX)
    made: str = matcher_class().grammar_from_regex(pattern)
    return made


def _grammar(text: Any) -> str:
    check_text(text, GRAMMAR)
    rules = len(_RULE.findall(text))
    if rules > MOST_RULES:
        expected = f"at most {MOST_RULES} rules"
        raise ArgumentError(f"expected {expected}, got {rules}", parameter=GRAMMAR)
    matcher = matcher_class()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark = any_to_lark(text)
    except RecursionError as error:
        raise ArgumentError("it is nested too deeply", parameter=GRAMMAR) from error
    except Exception as error:  # the converter raises plain exceptions
        raise ArgumentError(in_a_line(str(error)), parameter=GRAMMAR) from error
    check_text(lark, GRAMMAR)
    for schema in _schemas_in(lark):
        check_costs(schema, GRAMMAR)
    made: str = matcher.grammar_from_lark(lark + _NO_FORCING)
    return made


def _schemas_in(lark: str) -> Iterator[Any]:
    """Yield the JSON schemas in a grammar, which come after %json."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"%json\s*", lark):
        try:
            yield decoder.raw_decode(lark, match.end())[0]
        except (ValueError, RecursionError):  # the library says what is wrong with it
            continue


def in_a_line(message: str) -> str:
    """Return a message of the library, which may have many lines, as a short line."""
    if message.startswith("panic"):
        return "it is too large, or has a form that the library does not expect"
    line = " ".join(message.partition("<state>")[0].split())  # the state of its parser is no reason
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}..."
