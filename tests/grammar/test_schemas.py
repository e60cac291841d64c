"""Tests of JSON schemas of Python classes, and of schemas that are closed."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import jsonschema
import pytest

from phicore.errors import ArgumentError
from phicore.grammar.schemas import closed, schema_of


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Wheel:
    size: float
    spokes: int = 0


@dataclass
class Bicycle:
    name: str
    colour: Colour
    wheels: list[Wheel]
    weights: dict[str, float] = field(default_factory=dict)
    range: tuple[int, str] | None = None
    parent: Bicycle | None = None
    made: int = field(default=0, init=False)


class Point(TypedDict):
    x: int
    y: NotRequired[Annotated[int, "unit: m"]]


GOOD: list[tuple[Any, Any]] = [
    (str, "a"),
    (int | None, None),
    (Literal["a", 3], 3),
    (list[bool], [True, False]),
    (tuple[int, ...], [1, 2, 3]),
    (tuple[int, str], [1, "b"]),
    (dict[str, int], {"a": 1}),
    (Any, {"a": [1]}),
    (Colour, "red"),
    (Point, {"x": 1}),
    (Bicycle, {"name": "a", "colour": "blue", "wheels": [{"size": 1.5}]}),
    (
        Bicycle,
        {
            "name": "a",
            "colour": "blue",
            "wheels": [],
            "parent": {"name": "b", "colour": "red", "wheels": [], "range": [1, "km"]},
        },
    ),
]
BAD: list[tuple[Any, Any]] = [
    (str, 1),
    (int, 1.5),
    (Literal["a", 3], "b"),
    (list[bool], [1]),
    (tuple[int, str], [1, "b", 2]),
    (tuple[int, str], [1]),
    (Colour, "green"),
    (Point, {"y": 1}),
    (Point, {"x": 1, "z": 1}),
    (Bicycle, {"name": "a", "colour": "blue"}),
    (Bicycle, {"name": "a", "colour": "blue", "wheels": [{"size": "big"}]}),
    (Bicycle, {"name": "a", "colour": "blue", "wheels": [], "made": 3}),
]


@pytest.mark.parametrize(("kind", "value"), GOOD, ids=str)
def test_value_of_a_class_follows_its_schema(kind: Any, value: Any):
    assert jsonschema.Draft202012Validator(schema_of(kind)).is_valid(value)


@pytest.mark.parametrize(("kind", "value"), BAD, ids=str)
def test_value_of_another_kind_does_not(kind: Any, value: Any):
    assert not jsonschema.Draft202012Validator(schema_of(kind)).is_valid(value)


def test_pydantic_model_gives_its_own_schema():
    class Model:
        """Has what Pydantic's models have."""

        @classmethod
        def model_json_schema(cls) -> dict[str, Any]:
            return {
                "type": "object",
                "properties": {"wheel": {"$ref": "#/$defs/Wheel"}},
                "$defs": {"Wheel": {"type": "integer"}},
            }

    validator = jsonschema.Draft202012Validator(schema_of(Model))
    assert validator.is_valid({"wheel": 1})
    assert not validator.is_valid({"wheel": "a"})
    assert not validator.is_valid({"other": 1})


@pytest.mark.parametrize("kind", [set[int], object, 5, dict[int, str], print], ids=str)
def test_class_without_a_form_in_json_is_refused(kind: Any):
    with pytest.raises(ArgumentError, match="json_schema: expected a JSON schema, or a class"):
        schema_of(kind)


def test_closed_objects_have_the_named_properties_alone():
    inner = {"type": "object", "properties": {"b": {}}}
    schema = {
        "properties": {"a": inner, "c": {"type": "array", "items": inner}},
        "$defs": {"d": {"anyOf": [inner, {"type": "object"}]}},
        "default": inner,
        "const": inner,
    }
    shut = {**inner, "additionalProperties": False}
    assert closed(schema) == {
        "properties": {"a": shut, "c": {"type": "array", "items": shut}},
        "$defs": {"d": {"anyOf": [shut, {"type": "object"}]}},
        "default": inner,
        "const": inner,
        "additionalProperties": False,
    }
    for other in ({"additionalProperties": True}, {"patternProperties": {"x": {}}}):
        assert closed({**inner, **other}) == {**inner, **other}
    both = {"allOf": [inner, inner]}
    assert closed(both) == both
