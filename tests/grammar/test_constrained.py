"""Tests of answers that a schema, an expression or a grammar constrains, on every backend."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.tiny_models import write_tiny
from engine.test_speculation import Eager

import phicore
from phicore import Model
from phicore.errors import ArgumentError

DIGITS = r"[0-9]{3,5}"
OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "é": {"enum": ["x"]}},
    "required": ["a", "é"],
}
SUM = 'root ::= digit ("+" digit)*\ndigit ::= [0-9]'
LARK = 'start: "<" WORD ">"\nWORD: /[a-c]{2}/'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(tiny: Path, backend_name: str, ops: object) -> Iterator[Model]:
    with phicore.load(tiny, backend_name, max_sequences=4) as model:
        yield model


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Iterator[Model]:
    with phicore.load(tiny, "numpy") as model:
        yield model


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": DIGITS}, DIGITS),
        ({"json_schema": OBJECT}, r'\{"a":[0-9]{1,2},"é":"x"\}'),
        ({"json_schema": json.dumps(OBJECT)}, r'\{"a":[0-9]{1,2},"é":"x"\}'),
        ({"grammar": SUM}, r"[0-9](\+[0-9])*"),
        ({"grammar": LARK}, r"<[a-c]{2}>"),
        ({"regex": " x"}, " x"),  # a space at the start is not dropped
    ],
    ids=["regex", "schema", "schema-text", "gbnf", "lark", "space"],
)
@pytest.mark.parametrize("temperature", [0, 2])
def test_answer_is_what_the_constraint_allows(
    model: Model, constraint: dict[str, Any], pattern: str, temperature: float
):
    for seed in range(3):
        generation = model.generate(
            "Hello", max_tokens=200, temperature=temperature, seed=seed, **constraint
        )
        pieces = list(generation)
        text = "".join(piece.text for piece in pieces)
        if pieces[-1].finish_reason == "stop":
            assert re.fullmatch(pattern, text)
        else:
            assert "gram" in str(constraint), text  # a sum may go on for ever


def test_texts_of_a_batch_are_those_of_each_alone(model: Model, reference: Model):
    """Some requests are constrained, and others are not."""
    options: list[dict[str, Any]] = [
        {"regex": DIGITS},
        {},
        {"json_schema": OBJECT, "temperature": 1.5},
        {"regex": "[a-z]+", "processors": ["frequency-penalty=1"]},
        {"temperature": 1.5},
        {"json_schema": OBJECT, "logprobs": 2},
    ]

    def requests(model: Model) -> list[Any]:
        return [
            model.request("Hello", seed=seed, max_tokens=30, **each)
            for seed, each in enumerate(options)
        ]

    together = [answer.text for answer in model.generate_many(requests(model), ordered=True)]
    assert together == [model.generate(each).text() for each in requests(model)]
    assert together == [reference.generate(each).text() for each in requests(reference)]


def test_speculation_changes_no_constrained_answer(tiny: Path, model: Model, backend_name: str):
    """Alone, and in a batch with answers whose tokens are guessed."""
    settings = [{"temperature": 0}, {"temperature": 1.5, "seed": 7}]
    constraints = [{"regex": "(ab|cd){5,20}"}, {"json_schema": OBJECT}, {}]
    made = [
        model.request("Hello Hello Hello", max_tokens=40, **constraint, **setting)
        for constraint in constraints
        for setting in settings
    ]
    expected = [model.generate(request) for request in made]
    texts = [generation.text() for generation in expected]
    with phicore.load(tiny, backend_name, max_sequences=8, speculation=True) as quick:
        quick.engine.scheduler = Eager(max_sequences=8)
        alone = [quick.generate(request) for request in made]
        assert [generation.text() for generation in alone] == texts
        together = list(quick.generate_many(made, ordered=True))
        assert [answer.text for answer in together] == texts
        for found in (alone, [answer.generation for answer in together]):
            assert [one.token_ids for one in found] == [one.token_ids for one in expected]
            assert sum(one.timings.accepted_tokens for one in found) > 0


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"json_schema": {"type": "hiccup"}}, "json_schema: Invalid type: hiccup"),
        ({"json_schema": {"not": {}}}, "json_schema: Unimplemented keys"),
        (
            {"json_schema": {"not": {}, "x-guidance": {"lenient": True}}},
            "json_schema: Unimplemented keys",
        ),
        ({"json_schema": {"type": "string", "format": "no"}}, "json_schema: Unknown format: no"),
        ({"json_schema": {"$ref": "http://localhost:1/"}}, "json_schema: .*not present"),
        ({"json_schema": "{no"}, "json_schema: not JSON: Expecting"),
        ({"json_schema": "[1]"}, "json_schema: expected a JSON object"),
        ({"json_schema": {"enum": [{1}]}}, "json_schema: not JSON"),
        ({"json_schema": 5}, "json_schema: expected a JSON schema, or a class"),
        ({"regex": "("}, "regex: .*unclosed group"),
        ({"regex": 5}, "regex: expected a text, got 5"),
        ({"regex": "\ud800"}, "regex: it has half of a character"),
        ({"grammar": 'start: "\ud800"'}, "grammar: it has half of a character"),
        ({"grammar": 'start: start "x"'}, "grammar: NoExtensionBias$"),  # without its state
        ({"grammar": "nothing"}, "grammar: Expected ::= at line 1"),
        ({"grammar": "start: nothing"}, 'grammar: .*unknown name: "nothing"'),
        ({"grammar": b""}, "grammar: expected a text"),
        ({"regex": "a", "grammar": SUM}, "regex: not together with grammar"),
        ({"regex": "a", "ignore_eos": True}, "regex: not together with ignore_eos"),
    ],
    ids=str,
)
def test_constraint_that_cannot_be_honoured_is_refused_in_one_line(
    reference: Model, constraint: dict[str, Any], message: str
):
    with pytest.raises(ArgumentError, match=message) as caught:
        reference.request("Hello", **constraint)
    assert "\n" not in str(caught.value)


def test_tokens_that_the_tokenizer_lacks_are_forbidden(reference: Model):
    request = reference.request("Hello", regex="[a-z]+", max_tokens=50, temperature=50, seed=3)
    (allowed,) = request.processors
    state = allowed.start(request.prompt_ids, reference.vocab_size)
    bits = np.unpackbits(state["mask"], bitorder="little")
    assert len(state["mask"]) == -(-reference.vocab_size // 8)
    assert not bits[reference.tokenizer.vocab_size :].any()
    ids = np.flatnonzero(bits).tolist()
    assert ids
    assert all(re.fullmatch(rb"[a-z]+", reference.tokenizer.token_bytes(id)) for id in ids)


def test_one_request_can_be_answered_several_times_at_once(reference: Model):
    request = reference.request("Hello", regex="[a-z]{1,9}[0-9]", seed=4, max_tokens=30)
    expected = reference.generate(request).text()
    answers = list(reference.generate_many([request] * 3))
    assert [answer.text for answer in answers] == [expected] * 3
