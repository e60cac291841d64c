"""Schemas, expressions and grammars that want all of the time, the memory or the stack."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from api.tiny_models import write_tiny
from hostile.conftest import tries, watched
from hypothesis import given
from hypothesis import strategies as st

import phicore
from phicore.errors import ArgumentError, PhicoreError
from phicore.grammar import AllowedTokens, Vocabulary, constraint_of
from phicore.grammar.constraints import MOST_TEXT


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vocabulary]:
    with phicore.load(write_tiny(tmp_path_factory.mktemp("m") / "tiny.gguf"), "numpy") as model:
        yield model.grammar_vocabulary


def followed(vocabulary: Vocabulary, **constraint: Any) -> str:
    """Follow a constraint for some tokens; return "ok", or the line with which it is refused."""
    with watched("constraints"):
        try:
            made = constraint_of(**constraint)
            assert made is not None
            allowed = AllowedTokens(vocabulary, made)
        except ArgumentError as error:
            line = str(error)
        else:
            return _answered(vocabulary, allowed)
    assert "\n" not in line
    assert len(line) < 600
    return line


def _answered(vocabulary: Vocabulary, allowed: AllowedTokens) -> str:
    """Answer with the last token that is allowed, each time."""
    import numpy as np

    try:
        state = allowed.start([], vocabulary.size)
        for _ in range(10):
            bits = np.unpackbits(state["mask"], bitorder="little")[: vocabulary.size]
            token = int(np.flatnonzero(bits)[-1])
            if token in vocabulary.ends:
                break
            state = allowed.update(token)
    except PhicoreError as error:  # it is too complex, which only the answer shows
        line = str(error)
    else:
        return "ok"
    assert "\n" not in line
    assert len(line) < 600
    return line


def chain(part: Any, size: int) -> dict[str, Any]:
    """Return a schema whose definitions refer to each other, one after the other."""
    definitions = {f"d{i}": part(f"#/$defs/d{i + 1}") for i in range(size)}
    return {"$defs": definitions | {f"d{size}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def nested(size: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(size):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def rules(one: str, last: str, size: int, first: str = "start: ") -> str:
    lines = [one.format(i, i + 1) for i in range(size)]
    return "\n".join([first + one.split("{")[0] + "0", *lines, last.format(size)])


BOMBS: dict[str, dict[str, Any]] = {
    "repetition of repetitions": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "large repetition": {"regex": "a{1,1000000000}"},
    "repetition of a repetition, of one length": {"regex": "(a{1000}){1000}"},
    "long value": {"json_schema": {"const": "a" * 200_000}},
    "states": {"regex": "(.*a.{20})|(.*b.{20})|(.*c.{20})"},
    "parentheses": {"regex": "(" * 50000 + "a" + ")" * 50000},
    "parentheses within the limits": {"regex": "(" * 200 + "a" + "|b)*" * 200},
    "long expression": {"regex": "|".join(map(str, range(MOST_TEXT)))},
    "least length": {"json_schema": {"type": "string", "minLength": 10**9}},
    "least items": {"json_schema": {"type": "array", "minItems": 10**9}},
    "least items of one value": {
        "json_schema": {"type": "array", "items": {"const": 1}, "minItems": 10**9}
    },
    "values": {"json_schema": {"enum": [f"value {i}" for i in range(15000)]}},
    "properties": {"json_schema": {"properties": {f"p{i}": {} for i in range(10000)}}},
    "properties within the limits": {
        "json_schema": {"properties": {f"p{i}": {} for i in range(1000)}}
    },
    "references": {"json_schema": chain(lambda r: {"$ref": r}, 5000)},
    "references in allOf": {"json_schema": chain(lambda r: {"allOf": [{"$ref": r}, {}]}, 4000)},
    "references in anyOf": {
        "json_schema": chain(lambda r: {"anyOf": [{"$ref": r}, {"type": "null"}]}, 3500)
    },
    "references in items": {"json_schema": chain(lambda r: {"items": {"$ref": r}}, 4500)},
    "references twice": {"json_schema": chain(lambda r: {"prefixItems": [{"$ref": r}] * 2}, 100)},
    "reference to itself": {"json_schema": {"$ref": "#"}},
    "reference to itself in allOf": {"json_schema": {"allOf": [{"$ref": "#"}]}},
    "deep schema": {"json_schema": nested(400)},
    "very deep schema": {"json_schema": nested(5000)},
    "very deep text": {"json_schema": '{"items":' * 50000 + "1" + "}" * 50000},
    "multiple": {"json_schema": {"type": "integer", "multipleOf": 1000003}},
    "multiple of a fraction": {"json_schema": {"type": "number", "multipleOf": 1.0000003}},
    "multiples": {"json_schema": {"multipleOf": 4093, "allOf": [{"multipleOf": 4095}]}},
    "multiple in a grammar": {"grammar": 'start: %json {"type": "integer", "multipleOf": 1000003}'},
    "product of alternatives": {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(3)]} for i in range(14)
            ]
        }
    },
    "large number": {"json_schema": {"type": "integer", "minimum": -(10**300)}},
    "text that is too long": {"json_schema": {"description": "a" * MOST_TEXT}},
    "rules": {"grammar": rules("r{}: r{} | r0", 'r{}: "a"', 10000)},
    "rules within the limits": {"grammar": rules("r{0}: r{1} r{1}", 'r{}: "a"', 990)},
    "doubled terminals": {"grammar": rules("R{0}: R{1} R{1}", 'R{}: "a"', 18)},
    "nested terminals": {"grammar": rules('R{}: R{} "b"', 'R{}: "a"', 990)},
    "rules of GBNF": {"grammar": rules("r{} ::= r{}", 'r{} ::= "a"', 20000, "root ::= ")},
    "alternatives of GBNF": {"grammar": "root ::= " + " | ".join(['"w"'] * 100000)},
    "parentheses of GBNF": {"grammar": "root ::= " + "(" * 20000 + '"a"' + ")" * 20000},
    "parentheses of Lark": {"grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000},
    "ambiguity": {"grammar": 'start: start start start | /./ | ""'},
    "repetition of rules": {"grammar": 'start: b{100000}\nb: a{100000}\na: "x"'},
    "an end that never comes": {"grammar": "start: /a+/ /a+/"},
    "an end that never comes, with options": {
        "grammar": 'start: /a+/ /a+/ /a+/\n%llguidance {"no_forcing": false}'
    },
    "an end that never comes, within": {"grammar": "start: x\nx: %lark { start: /a+/ /a+/ }"},
    "an end that never comes, of GBNF": {"grammar": "root ::= [a]+ [a]+"},
    "a schema without an end": {
        "json_schema": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    },
    "intersections": {"grammar": "start: A\nA: (/.*a.{15}/ & /.*b.{15}/) & ~(/.*c.{15}/)"},
}


@pytest.mark.parametrize("name", BOMBS)
def test_constraint_with_a_bomb_is_refused_in_a_line_or_followed(vocabulary: Vocabulary, name: str):
    followed(vocabulary, **BOMBS[name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("very deep schema", "json_schema: it is nested too deeply"),
        ("properties", "json_schema: expected objects with at most 2000 properties"),
        ("multiples", "json_schema: multipleOf"),
        ("multiple in a grammar", "grammar: multipleOf"),
        ("long expression", "regex: expected at most 262144 characters"),
        ("rules", "grammar: expected at most 1000 rules"),
    ],
)
def test_refusal_says_what_a_constraint_may_have(vocabulary: Vocabulary, name: str, message: str):
    assert followed(vocabulary, **BOMBS[name]).startswith(message)


KEYS = ["type", "enum", "const", "properties", "items", "prefixItems", "anyOf", "allOf", "oneOf"]
KEYS += ["required", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "$ref"]
KEYS += ["minimum", "maximum", "exclusiveMinimum", "multipleOf", "additionalProperties", "$defs"]
KEYS += ["patternProperties", "not", "if", "x-guidance", "uniqueItems", "a", "é", ""]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(
        ["object", "array", "string", "integer", "number", "#", "#/$defs/a", "^(a|b)*$", "date"]
    ),
)
SCHEMAS = st.dictionaries(
    st.sampled_from(KEYS),
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    max_size=5,
)
PIECES = ["a", "b", ".", "(", ")", "[", "]", "^", "|", "*", "+", "?", "{1,1000}", "{1000}", "\\d"]
PIECES += ["\\p{L}", "(?=", "(?i)", "\\1", "é", "\\", "{", "}", "a-z", "$", "\x00", "~", "&"]
EXPRESSIONS = st.lists(st.sampled_from(PIECES), max_size=15).map("".join)
WORDS = ["start", "root", ":", "::=", "\n", "|", '"a"', "/a+/", "A", "b", "(", ")", "*", "+", "?"]
WORDS += ["{2,9}", "[lazy]", "[max_tokens=3]", "%json", "{}", "%ignore", "/", '"', "<[3]>", "~"]
WORDS += ["&", "[a-z]", "{100000}", "%llguidance", "@", "#", "//", "\\", "->", "%import", "-1"]
GRAMMARS = st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join)


@tries(30)
@given(
    st.one_of(
        SCHEMAS.map(lambda schema: {"json_schema": schema}),
        SCHEMAS.map(lambda schema: {"json_schema": json.dumps(schema)}),
        EXPRESSIONS.map(lambda text: {"regex": text}),
        GRAMMARS.map(lambda text: {"grammar": text}),
        GRAMMARS.map(lambda text: {"grammar": f"start: a\na: {text}"}),
    )
)
def test_random_constraint_is_refused_in_a_line_or_followed(
    vocabulary: Vocabulary, constraint: dict[str, Any]
):
    followed(vocabulary, **constraint)
