"""Tests of the grammars of calls: what may follow the beginning of a call, in each form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jsonschema
import llguidance.numpy
import numpy as np
import pytest
from engine.test_speculation import Eager, alone, together
from server.test_tools import SCHEMAS, TEMPLATES, TOOLS, model_with

import phicore
from phicore import Model
from phicore.engine.drafts import NGrams
from phicore.engine.forced import Forced
from phicore.errors import ArgumentError
from phicore.grammar import Vocabulary, constrained
from phicore.tools import Tool

HI = [{"role": "user", "content": "Hi"}]
CALLS = {
    "generic": '<tool_call>\n{"name": "clock", "arguments": {"utc": true}}\n</tool_call>',
    "phi-4-mini": '<|tool_call|>[{"name": "clock", "arguments": {"utc": true}}]<|/tool_call|>',
    "qwen": '<tool_call>\n{"name": "clock", "arguments": {"utc": true}}\n</tool_call>',
    "llama": '{"name": "clock", "parameters": {"utc": true}}',
}


@pytest.fixture(scope="module", params=TEMPLATES)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(form: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = model_with(TEMPLATES[form], tmp_path_factory.mktemp("tools") / "tiny.gguf")
    with phicore.load(path, "numpy") as model:
        yield model


class Follower:
    """Follows an answer, and tells what may come next."""

    def __init__(self, model: Model, **options: Any) -> None:
        use = model.request(HI, tools=TOOLS, **options).tools
        assert use is not None
        self.model = model
        vocabulary = Vocabulary(model.tokenizer)
        _, constraint = constrained(use, vocabulary, model.tokenizer.control_id)
        self.matcher = vocabulary.matcher(constraint)
        self.words = np.zeros((1, -(-vocabulary.size // 32)), np.int32)

    def takes(self, text: str) -> bool:
        """Take a text, and return whether the grammar allows it."""
        ids = [id for part in re.split(r"(<\|/?tool_call\|>)", text) for id in self.ids(part)]
        return all(self.allowed(id) and self.matcher.consume_token(id) for id in ids)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a control token, or of a text that continues another one."""
        tokenizer = self.model.tokenizer
        if (id := tokenizer.control_id(text)) is not None:
            return [id]
        before = tokenizer.encode("\x02", add_bos=False)
        return tokenizer.encode(f"\x02{text}", add_bos=False)[len(before) :]

    def allowed(self, id: int) -> bool:
        llguidance.numpy.fill_next_token_bitmask(self.matcher, self.words, 0)
        return bool(self.words.view(np.uint8)[0, id // 8] >> (id % 8) & 1)

    @property
    def may_end(self) -> bool:
        return any(map(self.allowed, self.model.tokenizer.end_token_ids))


def test_text_is_free_and_a_call_is_bound_from_its_beginning(model: Model, form: str):
    call = CALLS[form]
    for before in ("", "Let me see: [1] <b> \n"):
        if form == "llama" and before:
            continue  # its calls are whole answers
        follower = Follower(model)
        assert follower.takes(before + call[: call.index("true")])
        assert not follower.may_end
        assert not follower.takes("maybe")
    follower = Follower(model)
    assert follower.takes(call)
    assert follower.may_end
    assert Follower(model).takes("Just <text> with } and ] and more.")
    assert Follower(model).may_end


def test_call_of_no_tool_cannot_begin(model: Model, form: str):
    call = CALLS[form].replace("clock", "cuckoo")
    assert not Follower(model).takes(call)
    assert not Follower(model, tool_choice="required").takes(call)


def test_forced_call_comes_first_and_once_if_it_is_single(model: Model, form: str):
    call = CALLS[form]
    inner = call.partition("[")[2].partition("]")[0]
    two = call.replace(inner, f"{inner}, {inner}") if inner else f"{call}\n{call}"
    assert not Follower(model, tool_choice="required").takes("Well")
    assert not Follower(model, tool_choice="required").may_end
    for options in ({"tool_choice": "required"}, {}):
        single = {**options, "parallel_tool_calls": False}
        assert Follower(model, **single).takes(call)
        assert not Follower(model, **single).takes(two)
        assert Follower(model, **options).takes(two) == (form != "llama")


@pytest.mark.parametrize("form", ["phi-4-mini"], indirect=True)  # its marker is one token
def test_call_that_the_model_begins_follows_the_schema(model: Model):
    """The beginning is made probable; the grammar does the rest, alone and in a batch."""
    marker = model.tokenizer.control_id("<|tool_call|>")
    requests = [
        model.request(
            HI,
            tools=TOOLS,
            parallel_tool_calls=False,
            seed=seed,
            max_tokens=400,
            processors=[f"logit-bias={marker}:90"],
        )
        for seed in range(4)
    ]
    for answer in model.generate_many(requests, ordered=True):
        message = answer.message()
        assert message["content"] is None
        [call] = message["tool_calls"]
        schema = SCHEMAS[call["function"]["name"]]
        jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
        assert model.generate(requests[answer.index]).text() == answer.text


def test_schema_is_left_out_only_where_nothing_needs_it(model: Model):
    bad = {"type": "object", "properties": {"a": {"not": {}}}}
    request = model.request(HI, tools=TOOLS)
    assert request.tools is not None
    tool = Tool("bad", {}, bad, False, "[0]")
    use = replace(request.tools, tools=(tool,))
    vocabulary, control_id = Vocabulary(model.tokenizer), model.tokenizer.control_id
    constrained(use, vocabulary, control_id)
    for wrong in (
        replace(use, is_forced=True),
        replace(use, tools=(replace(tool, is_strict=True),)),
    ):
        with pytest.raises(ArgumentError, match=r"^tools: \[0\]\.parameters: .*not"):
            constrained(wrong, vocabulary, control_id)


def test_speculation_changes_no_call(model: Model):
    """What a form and a schema force is guessed, and the calls stay the same."""
    settings: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 1.3, "seed": 5}]
    made = [
        model.request(HI, tools=TOOLS, tool_choice=choice, max_tokens=70, **each)
        for choice in ("required", "auto")
        for each in settings
    ]
    engine, scheduler = model.engine, model.engine.scheduler
    expected = alone(engine, made)
    engine.drafter, engine.scheduler = Forced(NGrams()), Eager(max_sequences=8)
    try:
        sequences = [engine.add(request) for request in made]
        while not engine.is_idle:
            engine.step()
        assert [s.answer for s in sequences] == [answer[0] for answer in expected]
        assert sum(s.timings.accepted_tokens for s in sequences[:2]) > 10
        assert [together(engine, [request])[0] for request in made] == expected
    finally:
        engine.drafter, engine.scheduler = None, scheduler
