"""Tests of the parser of calls: what is a call and what is text, however the answer comes."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phicore.tools import Begin, CallFormat, CallParser, Text, message_of
from phicore.tools.formats import HERMES, LLAMA_3, PHI_4

NAMES = ("add", "weather", "get.größe")
FORMATS = [HERMES, PHI_4, LLAMA_3]
Calls = list[tuple[str, str]]


def parsed(format: CallFormat, pieces: list[str], is_eager: bool = False) -> tuple[Any, Calls]:
    """Return the content and the calls of an answer."""
    parser = CallParser(format, NAMES, is_eager=is_eager)
    events = [event for piece in pieces for event in parser.push(piece)]
    message = message_of([*events, *parser.flush()])
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return message["content"], [(call["name"], call["arguments"]) for call in calls]


def call(name: str, arguments: str = "{}", key: str = "arguments") -> str:
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{key}": {arguments}}}'


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in calls)


def phi(*calls: str) -> str:
    return f"<|tool_call|>[{', '.join(calls)}]<|/tool_call|>"


ADD = call("add", '{"a": 1.0, "b": [2, {}]}')
ADDED = ("add", '{"a": 1.0, "b": [2, {}]}')
TRICK = call("weather", r'{"x": "}]</tool_call><|/tool_call|> \"{ \\"}')
TRICKED = ("weather", r'{"x": "}]</tool_call><|/tool_call|> \"{ \\"}')
PARAMETERS = call("add", '{"a": 1}', "parameters")


@pytest.mark.parametrize(
    ("format", "text", "content", "calls"),
    [
        (HERMES, hermes(ADD), None, [ADDED]),
        (HERMES, f"Let me see.\n{hermes(ADD, TRICK)}\n", "Let me see.", [ADDED, TRICKED]),
        (HERMES, f"<tool_call>{ADD}</tool_call>", None, [ADDED]),
        (HERMES, f"<tool_call>\n[{ADD}, {TRICK}]\n</tool_call>", None, [ADDED, TRICKED]),
        (HERMES, f"<tool_call>\n{ADD}", None, [ADDED]),  # the end marker lacks
        (HERMES, f"{hermes(ADD)}\n\nDone. ", "\n\nDone. ", [ADDED]),
        (PHI_4, phi(ADD), None, [ADDED]),
        (PHI_4, phi(ADD, TRICK), None, [ADDED, TRICKED]),
        (PHI_4, f"<|tool_call|>{ADD}<|/tool_call|>", None, [ADDED]),
        (LLAMA_3, PARAMETERS, None, [("add", '{"a": 1}')]),
        (LLAMA_3, f"\n\n{PARAMETERS}", None, [("add", '{"a": 1}')]),
        (LLAMA_3, f"<|python_tag|>{PARAMETERS}", None, [("add", '{"a": 1}')]),
        (LLAMA_3, f"So: <|python_tag|>{PARAMETERS}", "So:", [("add", '{"a": 1}')]),
        (LLAMA_3, '{"type": "function", ' + PARAMETERS[1:], None, [("add", '{"a": 1}')]),
        (HERMES, hermes('{"arguments": {"a": "é"}, "name": "add"}'), None, [("add", '{"a": "é"}')]),
        (HERMES, hermes('{"name": "add"}'), None, [("add", "{}")]),
        (
            HERMES,
            hermes(r'{"name": "add", "arguments": "{\"a\": 1}"}'),
            None,
            [("add", '{"a": 1}')],
        ),
        (HERMES, hermes(call("add", '{"a": "1\n2"}')), None, [("add", r'{"a": "1\n2"}')]),
        (HERMES, hermes(call("get.größe")), None, [("get.größe", "{}")]),
    ],
)
def test_calls_are_found_in_each_form(format: CallFormat, text: str, content: Any, calls: Calls):
    assert parsed(format, [text]) == (content, calls)
    assert parsed(format, list(text)) == (content, calls)


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (HERMES, "a < b, <tool and <tool_call"),
        (HERMES, "<tool_call> is a tag"),
        (HERMES, hermes('{"name": "add", "arguments": {"a": }}')),
        (HERMES, hermes('{"name": "add", "arguments": [1]}')),
        (HERMES, hermes('{"name": "add", "arguments": "nothing"}')),
        (HERMES, hermes(call("unknown"))),
        (HERMES, hermes('{"arguments": {}}')),
        (HERMES, f"<tool_call>\n{ADD[:-2]}"),
        (HERMES, " \n "),
        (PHI_4, phi(ADD, "1")),
        (PHI_4, phi()),
        (PHI_4, phi(ADD)[:-18]),
        (PHI_4, "<|tool_call|>" * 3),
        (LLAMA_3, '{"name": "Bob", "parameters": {}}'),
        (LLAMA_3, f"Look: {PARAMETERS}"),
        (LLAMA_3, "<|python_tag|>print(1)"),
        (LLAMA_3, "{" * 100 + "[" * 3000),
        (HERMES, "<tool_call>" + "[" * 30000 + "]" * 30000),
    ],
)
def test_what_only_looks_like_a_call_is_text(format: CallFormat, text: str):
    assert parsed(format, [text]) == (text, [])
    if len(text) < 1000:
        assert parsed(format, list(text)) == (text, [])


def test_marker_is_never_shown_and_text_before_it_comes_at_once():
    parser = CallParser(HERMES, NAMES)
    assert parser.push("Hello") == [Text("Hello")]
    assert parser.push(", you \n<tool") == [Text(", you")]
    assert parser.push("_bar") == [Text(" \n<tool_bar")]
    assert parser.push("\n<tool_call>\n") == []
    assert parser.push(ADD) == []
    assert parser.push("\n</tool_call>")[0] == Begin("add")


def test_eager_parser_tells_arguments_while_they_come():
    parser = CallParser(PHI_4, NAMES, is_eager=True)
    assert parser.push('<|tool_call|>[{"name": "add", "arguments": ') == []
    assert [type(event).__name__ for event in parser.push('{"a": ')] == ["Begin", "Arguments"]
    assert [event.text for event in parser.push('"xy')] == ['"xy']
    assert [event.text for event in parser.push('"}}, {"na')] == ['"}']
    assert parser.push('me": "weather", "arguments": {')[0] == Begin("weather")
    assert parser.flush() == []


# ---- laws ----------------------------------------------------------------------------------

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
_calls = st.lists(
    st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=4), _values, max_size=3)),
    min_size=1,
    max_size=3,
)
_parts = st.one_of(
    st.text(max_size=10),
    st.sampled_from(
        [
            *(" ", "\n", "{", "}", "[", "]", ",", '"', "<", "<tool_", "<|"),
            *(marker for format in FORMATS for marker in format.markers),
            *(ADD, TRICK, PARAMETERS, ADD[:20], hermes(ADD), phi(ADD, TRICK)),
        ]
    ),
)


def split(text: str, cuts: list[int]) -> list[str]:
    at = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(at)]


@given(st.sampled_from(FORMATS), st.lists(_parts, max_size=10), st.lists(st.integers(0, 2**20)))
def test_any_division_of_any_text_gives_the_same(
    format: CallFormat, parts: list[str], cuts: list[int]
):
    text = "".join(parts)
    whole = parsed(format, [text])
    assert parsed(format, split(text, cuts)) == whole
    assert parsed(format, list(text)) == whole
    if not whole[1]:
        assert whole[0] == text  # nothing is lost


@given(st.sampled_from(FORMATS), _calls, st.text(max_size=12), st.lists(st.integers(0, 2**20)))
def test_what_a_grammar_makes_is_found_whole_and_while_it_comes(
    format: CallFormat, calls: list[tuple[str, dict[str, Any]]], before: str, cuts: list[int]
):
    written = [(name, json.dumps(value, ensure_ascii=False)) for name, value in calls]
    if not format.has_many:
        written = written[:1]
    texts = [call(name, arguments, format.key) for name, arguments in written]
    after = "".join(texts) if format is LLAMA_3 else (hermes if format is HERMES else phi)(*texts)
    before = "" if format.is_bare else before.replace("<", "")
    expected = (before.rstrip() or None, written)
    pieces = split(before + after, cuts)
    assert parsed(format, pieces) == expected
    assert parsed(format, pieces, is_eager=True) == expected


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_cut_behind_the_last_call_is_the_same_while_it_comes(format: CallFormat):
    written = [call("add", "{}", format.key), call("weather", '{"x": 1}', format.key)]
    texts = written if format.has_many else written[:1]
    answer = "".join(texts) if format is LLAMA_3 else (hermes if format is HERMES else phi)(*texts)
    end = answer.rindex("}") + 1
    for length in range(end, len(answer) + 1):
        whole = parsed(format, [answer[:length]])
        assert len(whole[1]) == len(texts) or format.is_list  # a list that is not closed is no call
        if len(whole[1]) == len(texts):
            assert parsed(format, list(answer[:length]), is_eager=True) == whole
