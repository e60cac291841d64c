"""What users of other servers complain about, each as a test.

One complaint is about a page whose conversations are lost; the tests of the page have it.
"""

from __future__ import annotations

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server.conftest import ENDLESS, HI, Served, ready
from server.test_going_away import connect, read_until

import phicore
from phicore import Model
from phicore.server import Settings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def texts(served: Served, bodies: list[dict[str, Any]]) -> list[str]:
    """Return the texts of answers that are computed together."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(lambda body: served.post(CHAT, body), bodies))
    assert all(status == 200 for status, _, _ in found)
    return [answer["choices"][0]["message"]["content"] for _, answer, _ in found]


def test_generation_goes_on_after_the_client_has_gone(endless: Served):
    """llama.cpp 24496, 13262; ik_llama.cpp 1020; mlx-lm 1390."""
    for stream in (False, True):
        connection = connect(endless, {"messages": HI, **ENDLESS, "stream": stream})
        jobs = endless.service.worker.jobs
        endless.wait_until(lambda jobs=jobs: any(job.count > 2 for job in jobs), "an answer")
        [job] = jobs
        connection.close()
        endless.wait_until(lambda: endless.is_free, "the end")
        assert job.count < ENDLESS["max_tokens"]


@pytest.mark.parametrize(
    ("format", "problem"),
    [
        ({"type": "json_schema", "json_schema": {"schema": {"type": "hiccup"}}}, "Invalid type"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "Unimplemented keys"),
        ({"type": "json_schema", "json_schema": {"name": "a"}}, "schema: expected a JSON schema"),
        ({"type": "json_schema"}, "json_schema: expected an object"),
        ({"type": "hiccup"}, "type: expected text, json_object or json_schema"),
        ({}, "type: expected text, json_object or json_schema"),
    ],
    ids=str,
)
def test_schema_is_silently_not_enforced(served: Served, format: dict[str, Any], problem: str):
    """llama.cpp 19051, 24097; ollama 17933; mlx-lm 1007: what cannot be enforced is refused."""
    status, answer, _ = served.post(CHAT, {"messages": HI, "response_format": format})
    assert status == 400
    assert answer["error"]["param"] == "response_format"
    assert problem in answer["error"]["message"]


def test_one_long_prompt_stalls_all_others(endless: Served):
    """llama.cpp 29175: an answer goes on while a long prompt is read."""
    running = connect(endless, {"messages": HI, **ENDLESS, "stream": True})
    read_until(running, b'"content":"')
    worker = endless.service.worker
    [answer] = worker.jobs
    prompt = [{"role": "user", "content": "The sea. " * 1500}]
    reading = connect(endless, {"messages": prompt, **ENDLESS, "stream": True})
    endless.wait_until(lambda: len(worker.jobs) == 2, "the second request")
    before, second = answer.count, worker.jobs[1]
    endless.wait_until(lambda: second.count > 0, "its first token")
    assert answer.count - before > 10
    for connection in (running, reading):
        connection.close()
    endless.wait_until(lambda: endless.is_free, "the end")


def test_prompt_is_processed_anew_each_turn(served: Served):
    """llama.cpp 21831, 10427; ollama 1573: a turn reads what is new."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": "Tell me about the sea."}]
    body = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    first = served.post(CHAT, {"messages": turns, **body})[1]
    turns += [first["choices"][0]["message"], {"role": "user", "content": "And the wind?"}]
    second = served.post(CHAT, {"messages": turns, **body})[1]
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= first["usage"]["prompt_tokens"]
    assert second["usage"]["timings"]["prompt_n"] == second["usage"]["prompt_tokens"] - cached


def test_memory_grows_until_death(tiny_path: Path):
    """mlx-lm 1390, 1807; llama.cpp 26216: the prefix cache has a size and keeps to it."""
    with phicore.load(tiny_path, "numpy") as model:
        list(model.generate("The sea " * 10, max_tokens=2))
        one = model.engine.prefixes.bytes
    most = 3 * one
    with phicore.load(tiny_path, "numpy", prefix_cache_bytes=most) as model, ready(model) as served:
        for number in range(12):
            prompt = [{"role": "user", "content": f"{number} and {number} " * 5}]
            assert served.post(CHAT, {"messages": prompt, "max_tokens": 2})[0] == 200
            served.wait_until(lambda: served.is_free, "the end")
            running, prefixes, _ = model.engine.kv_usage
            assert running == 0
            assert 0 < prefixes <= most
        gc.collect()
        assert len(served.service._exchanges) <= 1


def test_same_seed_gives_another_text(served: Served, model: Model):
    """vLLM 5898, 23138, 966: not here, whoever computes beside it."""
    body = {"messages": HI, "max_tokens": 30, "seed": 42, "temperature": 1.2}
    others = [{**body, "seed": seed, "max_tokens": 5 + seed} for seed in range(7)]
    expected = model.generate("Hi", max_tokens=30, seed=42, temperature=1.2).text()
    for _ in range(2):
        assert texts(served, [*others, body])[-1] == expected


@pytest.mark.parametrize("arguments", ["{}", '{"a": ', {"a": 1}, "", None, 5, []], ids=repr)
def test_broken_tool_calls_in_a_conversation_are_faults_for_ever(served: Served, arguments: Any):
    """llama.cpp 20198, 25510; vLLM 10395: a conversation goes on, or is refused with a 400."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "42"},
        *HI,
    ]
    status, answer, _ = served.post(CHAT, {"messages": messages, "max_tokens": 2})
    assert status in (200, 400)
    assert status == 200 or answer["error"]["param"] == "messages"


def test_context_overflow_is_silent_or_inconsistent(served: Served, model: Model):
    """ollama 3839, 17889; llama.cpp 19774; lmstudio 2322: always 400, with the same words."""
    long = [{"role": "user", "content": "word " * 2000}]
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": long}),
        (CHAT, {"messages": long, "stream": True}),
        (CHAT, {"messages": [{"role": "system", "content": "word " * 2000}, *HI]}),
        (TEXT, {"prompt": "word " * 2000}),
        (TEXT, {"prompt": [5] * model.context, "stream": True}),
    ]
    for path, body in bodies:
        status, answer, _ = served.post(path, body)
        assert status == 400
        assert answer["error"]["code"] == "context_length_exceeded"
        assert "maximum context length is 320 tokens" in answer["error"]["message"]
    fits = {"prompt": [5] * (model.context - 4), "max_tokens": 100, "ignore_eos": True}
    answer = served.post(TEXT, fits)[1]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4


def test_usage_in_streams_is_missing_or_unasked_for(served: Served):
    """llama-cpp-python 1640; llama.cpp 16048; litellm 28735."""
    for path, body in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "The"})):
        body = {**body, "max_tokens": 3}
        *plain, _ = [json.loads(e) for e in served.events(body, path)[:-1]]
        assert not any("usage" in chunk for chunk in plain)
        asked = {**body, "stream_options": {"include_usage": True}}
        *parts, last = [json.loads(e) for e in served.events(asked, path)[:-1]]
        assert all(part["usage"] is None for part in parts)
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] >= 1


def test_characters_come_in_halves(served: Served, model: Model):
    """llama.cpp 4036, 28926; mlc-llm 804: a character comes whole, in one part of a stream."""
    for seed in range(200):
        text = model.generate("Hi", seed=seed, max_tokens=60, temperature=1.5).text()
        whole = [c for c in text if ord(c) > 127 and c != "\ufffd"]
        if whole:
            break
    body = {"messages": HI, "seed": seed, "max_tokens": 60, "temperature": 1.5}
    parts = [
        json.loads(e)["choices"][0]["delta"].get("content", "") for e in served.events(body)[:-1]
    ]
    assert "".join(parts) == text
    assert any(whole[0] in part for part in parts)


def test_queue_has_no_bound_or_a_full_one_is_a_500(endless: Served):
    """ollama 7758, 4124, 4159."""
    connections = [connect(endless, {"messages": HI, **ENDLESS, "stream": True}) for _ in range(4)]
    endless.wait_for_rows(4)
    for _ in range(20):
        status, answer, headers = endless.post(CHAT, {"messages": HI, "max_tokens": 1})
        assert status == 503
        assert "retry-after" in headers
        assert "error" in answer
    for connection in connections:
        connection.close()
    endless.wait_until(lambda: endless.is_free, "the end")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": HI, "max_tokens": "many"},
        {"messages": HI, "temperature": "x"},
        {"messages": {"role": "user"}},
        {"messages": [{"role": "user", "content": {"text": "Hi"}}]},
        {"messages": [{"role": "assistant", "content": None}]},
        {"messages": [{"role": "no such role", "content": "Hi", "name": 5}]},
        {"messages": HI, "logit_bias": [1]},
        {"messages": HI, "stop": {"a": 1}},
        {"messages": HI, "chat_template_kwargs": {"messages": []}},
        {"messages": HI, "chat_template_kwargs": {"add_generation_prompt": "x", "self": 1}},
        {"messages": HI, "documents": "none"},
    ],
    ids=str,
)
def test_faults_of_clients_are_told_as_faults_of_the_server(served: Served, body: dict[str, Any]):
    """llama.cpp 23463, 9522, 25510; mlx_lm.server drops the connection."""
    status, answer, _ = served.post(CHAT, {"max_tokens": 1, **body})
    assert status in (200, 400)
    if status == 400:
        assert answer["error"]["type"] == "invalid_request_error"
        assert answer["error"]["message"]


def test_row_of_a_batch_differs_from_the_row_alone(served: Served):
    """mlx-lm 1906: prompts of other lengths beside it change nothing."""
    bodies: list[dict[str, Any]] = [
        {
            "messages": [{"role": "user", "content": "The sea. " * length}],
            "max_tokens": 12,
            "temperature": 0,
        }
        for length in (1, 9, 3, 14, 2)
    ]
    alone = [texts(served, [body])[0] for body in bodies]
    assert texts(served, bodies) == alone


@pytest.mark.complete
def test_requests_under_load_are_compiled_anew(tiny_path: Path):
    """sglang-jax 609; JetStream 92: after the warm-up, numbers of rows that change compile nothing.

    Log probabilities neither.
    """
    settings = Settings(warmup=True)
    with (
        phicore.load(tiny_path, "jax", max_sequences=4) as model,
        ready(model, settings=settings) as served,
    ):
        compiled: list[str] = []
        steps = model.engine.runner.steps
        steps.progress = lambda what, *_: compiled.append(what)  # type: ignore[assignment]
        bodies = [
            {"messages": HI, "max_tokens": 3 + 5 * i, "seed": i, "logprobs": i % 2 == 0}
            for i in range(10)
        ]
        texts(served, bodies)
        assert compiled == []
