"""Tests of conversations with tools in prompts: as each kind of template shows them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from phicore.errors import ArgumentError, TokenizerError
from phicore.text.chat_template import ChatTemplate
from phicore.tools import format_of, tool_use
from phicore.tools.choices import checked_tools
from phicore.tools.formats import GENERIC, HERMES, LLAMA_3, PHI_4
from phicore.tools.history import arranged, checked_history

# Written after the templates that these models are published with, without their long texts.
QWEN = """
{%- if tools %}<|im_start|>system
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Return calls within <tool_call></tool_call> tags.<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == "assistant" %}
{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{ '\n' + message.content }}{% endif %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{% set tool_call = tool_call.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- elif message.role == "tool" %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set user = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\n\n' }}
{%- if tools is not none %}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of arguments}.\n\n' }}
{%- for t in tools %}{{ t | tojson(indent=4) }}{{ '\n\n' }}{% endfor %}{% endif %}
{{- user + '<|eot_id|>' }}
{%- for message in messages %}
{%- if not (message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}
{%- set tool_call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", ' }}
{{- '"parameters": ' }}{{ tool_call.arguments | tojson }}{{ '}' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
{%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}
{%- else %}{{ message.content }}{% endif %}{% endif %}{{ '<|eot_id|>' }}
{%- endfor %}"""
HERMES_2 = (
    "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<tool_response>{{ '{\"name\": \"' + m.name + '\", \"content\": ' }}"
    "{{ m.content }}{{ '}' }}</tool_response>{% elif m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
PHI_4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + "
    "'<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + "
    "message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {"name": "clock", "description": "Tell the time.", "strict": True},
}
SHOWN = {
    "name": "clock",
    "description": "Tell the time.",
    "parameters": {"type": "object", "properties": {}},
}


def call(id: str, arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "clock", "arguments": arguments}}


TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": None, "tool_calls": [call("1", '{"é": 1.5}')]},
    {"role": "tool", "tool_call_id": "1", "content": "12:00"},
]


def prompt(source: str, messages: list[dict[str, Any]], tools: Any = (CLOCK,)) -> str:
    turns, listed = arranged(checked_history(messages), checked_tools(tools), format_of(source))
    return ChatTemplate(source).render(turns, tools=listed)


def test_form_is_recognized_from_the_template():
    found = [format_of(source) for source in (QWEN, HERMES_2, LLAMA, PHI_4_MINI, CHATML)]
    assert [each.name for each in found] == ["Hermes", "Hermes", "Llama 3", "Phi-4-mini", "generic"]
    assert found[0] == HERMES
    assert found[2] == LLAMA_3
    assert found[3].markers == PHI_4.markers
    assert format_of("{{ tools }} [TOOL_CALLS]") == GENERIC


def test_qwen_reads_calls_and_results_itself():
    found = prompt(QWEN, TALK)
    assert json.dumps({"type": "function", "function": SHOWN}) in found
    assert '<tool_call>\n{"name": "clock", "arguments": {"é": 1.5}}\n</tool_call>' in found
    assert "user\n<tool_response>\n12:00\n</tool_response><|im_end|>" in found


def test_llama_reads_one_call_at_a_time():
    found = prompt(LLAMA, TALK)
    assert '"description": "Tell the time."' in found
    assert '{"name": "clock", "parameters": {"é": 1.5}}<|eot_id|>' in found
    assert 'ipython<|end_header_id|>\n\n"12:00"' in found
    two = [TALK[0], {**TALK[1], "tool_calls": [call("1", {}), call("2", {})]}, TALK[2]]
    with pytest.raises(TokenizerError, match="single tool-calls"):
        prompt(LLAMA, two)


def test_result_gets_the_name_that_a_template_reads():
    assert '{"name": "clock", "content": 12:00}' in prompt(HERMES_2, TALK)


def test_phi_4_mini_reads_tools_of_the_system_message_and_calls_as_text():
    found = prompt(PHI_4_MINI, TALK)
    assert found == (
        f"<|system|><|tool|>[{json.dumps(SHOWN)}]<|/tool|><|end|><|user|>When?<|end|><|assistant|>"
        '<|tool_call|>[{"name": "clock", "arguments": {"é": 1.5}}]<|/tool_call|><|end|>'
        "<|tool_response|>12:00<|end|><|assistant|>"
    )
    system = [{"role": "system", "content": "Be brief."}, *TALK]
    assert prompt(PHI_4_MINI, system).startswith("<|system|>Be brief.<|tool|>[{")


def test_template_without_tools_gets_them_as_text():
    two = {**TALK[1], "content": "Look:", "tool_calls": [call("1", {"a": 1}), call("2", {})]}
    talk = [TALK[0], two, TALK[2], {"role": "tool", "tool_call_id": "2", "content": "13:00"}]
    found = prompt(CHATML, talk)
    assert found.startswith("<|im_start|>system\nYou may call")
    assert json.dumps(SHOWN) in found
    assert (
        "<|im_start|>assistant\nLook:\n"
        '<tool_call>\n{"name": "clock", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n12:00\n</tool_response>\n"
        "<tool_response>\n13:00\n</tool_response><|im_end|>\n"
    ) in found
    assert "You may call" not in prompt(CHATML, talk, tools=())
    system = [{"role": "system", "content": "Be brief."}, *TALK]
    assert prompt(CHATML, system).startswith("<|im_start|>system\nBe brief.\n\nYou may call")


def test_arguments_of_a_call_are_checked():
    for good in ("", "{}", {}, None, " "):
        [_, turn, _] = checked_history(
            [TALK[0], {**TALK[1], "tool_calls": [call("1", good)]}, TALK[2]]
        )
        assert turn["tool_calls"][0]["function"]["arguments"] == {}
    wrong: list[tuple[Any, str]] = [
        ([call("1", '{"a"')], "[0].function.arguments: not JSON"),
        ([call("1", {}), call("2", "[]")], "[1].function.arguments: expected a JSON object"),
        ([{"id": "1", "function": {}}], "[0].function.name"),
        ([{**call("1", {}), "id": 5}], "[0].id"),
        ([{**call("1", {}), "type": "custom"}], "[0].type: expected function"),
        (["clock"], "[0]: expected an object"),
        ("clock", "expected a list"),
    ]
    for calls, words in wrong:
        with pytest.raises(TokenizerError) as error:
            checked_history([TALK[0], {"role": "assistant", "tool_calls": calls}])
        assert words in str(error.value)
        assert "messages[1].tool_calls" in str(error.value)


def test_choice_names_what_may_be_called():
    tools = checked_tools([CLOCK, {"name": "bare"}])
    assert tool_use(HERMES, tools, "none") is None
    assert tool_use(HERMES, [], "auto") is None
    auto = tool_use(HERMES, tools)
    assert auto is not None
    assert (auto.is_forced, auto.is_single, auto.needs_grammar) == (False, False, True)  # strict
    bare = tool_use(HERMES, tools, {"type": "function", "function": {"name": "bare"}})
    assert bare is not None
    assert (bare.is_forced, bare.is_single, [t.name for t in bare.tools]) == (True, True, ["bare"])
    named = {"tools": [{"function": {"name": "bare"}}] * 9}  # each is offered once
    allowed = tool_use(HERMES, tools, {"type": "allowed_tools", "allowed_tools": named})
    assert allowed is not None
    assert [tool.name for tool in allowed.tools] == ["bare"]
    with pytest.raises(ArgumentError, match=r"'x' is not among the tools \(clock, bare\)"):
        tool_use(HERMES, tools, {"type": "function", "function": {"name": "x"}})
