"""Metrics, logs, warm-up."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.conftest import ENDLESS, HI, Served, ready
from server.test_going_away import connect

import phicore
from phicore import Model
from phicore.server import Settings
from phicore.server.logs import Lines
from phicore.text.chat_template import ChatTemplate

CHAT = "/v1/chat/completions"


@pytest.fixture
def fresh(model: Model) -> Iterator[Served]:
    with ready(model) as found:
        yield found


def values(served: Served) -> dict[str, float]:
    """Return the values of all metrics, by name and the label beside the model's."""
    status, text, headers = served.get("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "le")}
            found[" ".join([sample.name, *labels.values()])] = sample.value
    return found


def test_metrics_have_vllms_names_and_count_what_happened(fresh: Served):
    prompt = [{"role": "user", "content": "The sea and the wind and the ship. " * 2}]
    for _ in range(2):
        body = {"messages": prompt, "max_tokens": 5, "ignore_eos": True, "seed": 1}
        usage = fresh.post(CHAT, body)[1]["usage"]
    fresh.wait_until(lambda: fresh.is_free, "the end")
    found = values(fresh)
    tokens = usage["prompt_tokens"]
    assert found["vllm:prompt_tokens_total"] == 2 * tokens
    assert found["vllm:generation_tokens_total"] == 10
    assert found["vllm:prefix_cache_queries_total"] == 2 * tokens
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert found["vllm:prefix_cache_hits_total"] >= cached > 0
    assert found["vllm:request_success_total length"] == 2
    assert found["vllm:request_success_total error"] == 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"vllm:{name}_seconds_count"] == 2
    assert found["vllm:inter_token_latency_seconds_count"] == 8
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert 0 < found["vllm:kv_cache_usage_perc"] <= 1
    assert found[f"phicore:http_responses_total POST {CHAT} 200"] == 2


def test_running_and_waiting_are_told(endless: Served):
    body = {"messages": HI, "stream": True, **ENDLESS}
    connections = [connect(endless, body) for _ in range(3)]

    def is_seen() -> bool:
        found = values(endless)
        counts = found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]
        return counts == (2, 1)

    endless.wait_until(is_seen, "two that run and one that waits")
    for connection in connections:
        connection.close()
    endless.wait_until(lambda: endless.is_free, "the end")
    assert values(endless)["vllm:request_success_total abort"] >= 3


def test_path_of_a_metric_is_the_pattern_of_the_route(fresh: Served):
    for name in ("a", "b", "c"):
        fresh.get(f"/v1/models/{name}")
        fresh.get(f"/no/such/path/{name}")
    names = [name for name in values(fresh) if name.startswith("phicore:http_responses_total")]
    assert not any(re.search(r"/[abc] ", name) for name in names)
    assert "phicore:http_responses_total GET other 404" in names


def test_methods_that_clients_invent_are_counted_as_one(fresh: Served):
    """Each had a counter of its own, for ever, and nobody needed a key to make one."""
    for number in range(3):
        fresh.ask(f"INVENTED{number}", "/health")
        fresh.ask("A" * 60000 + str(number), "/no/such/path")
    names = values(fresh)
    assert not any("INVENTED" in name or "AAAA" in name for name in names)
    assert "phicore:http_responses_total other /health 405" in names
    assert "phicore:http_responses_total other other 404" in names


def test_request_id_is_taken_told_and_logged_but_no_text(
    fresh: Served, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    body = {"messages": [{"role": "user", "content": "swordfish"}], "max_tokens": 2, "user": "who"}
    _, answer, headers = fresh.post(CHAT, body, X_Request_Id="my-id.1")
    assert headers["x-request-id"] == "my-id.1"
    _, _, headers = fresh.post(CHAT, body, X_Request_Id="a b")
    assert re.fullmatch(r"[0-9a-f]{32}", headers["x-request-id"])

    def requests() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.getMessage() == "request"]

    fresh.wait_until(lambda: len(requests()) == 2, "the second line")
    records = [record for record in caplog.records if record.name.startswith("phicore.server")]
    lines = [json.loads(Lines(as_json=True).format(record)) for record in records]
    assert [line["status"] for line in lines if line["message"] == "request"] == [200, 200]
    text = answer["choices"][0]["message"]["content"]
    for record in records:
        for as_json in (False, True):
            line = Lines(as_json=as_json).format(record)
            assert "swordfish" not in line
            assert not text or text not in line


def test_texts_are_logged_on_request(model: Model, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    with ready(model, settings=Settings(log_text=True)) as served:
        body = {"messages": [{"role": "user", "content": "swordfish"}], "max_tokens": 1}
        served.post(CHAT, body)
    lines = [Lines(as_json=False).format(record) for record in caplog.records]
    assert any("swordfish" in line for line in lines)


@pytest.mark.parametrize("path", ["/\x1b[2J", "/a b", "/x\nlevel=error", "/\x9b31m", '/"=', "/é"])
def test_path_of_a_client_cannot_write_into_the_log_as_it_likes(path: str):
    record = logging.makeLogRecord({"msg": "request", "fields": {"path": path}})
    line = Lines(as_json=False).format(record)
    assert re.fullmatch(r"[ -~]+", line)
    assert json.loads(line.partition(" path=")[2]) == path


def test_words_of_a_client_in_a_message_or_a_traceback_stay_in_its_line():
    """A template that leaves out messages says their roles, which clients choose."""
    role = "x\n2026 info all is well\x1b[2J\ud800"
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    messages = [{"role": role, "content": "a"}, {"role": "user", "content": "b"}]
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("phicore")
    logger.addHandler(handler)
    try:
        ChatTemplate(source).render(messages)
    finally:
        logger.removeHandler(handler)
    [line] = [Lines(as_json=False).format(record) for record in records]
    assert r"x\n2026 info all is well\x1b[2J\ud800" in line
    assert line.isprintable()
    try:
        raise ValueError(role)
    except ValueError:
        record = logging.makeLogRecord({"msg": "a fault", "exc_info": sys.exc_info()})
    lines = Lines(as_json=False).format(record).split("\n")
    assert all(line.isprintable() for line in lines)


def test_after_the_warm_up_requests_compile_nothing(tiny_path: Path):
    with (
        phicore.load(tiny_path, "jax", max_sequences=3) as model,
        ready(model, settings=Settings(warmup=True, max_queue=20)) as served,
    ):
        compiled: list[str] = []
        steps = model.engine.runner.steps
        steps.progress = lambda what, *_: compiled.append(what)  # type: ignore[assignment]
        bodies: list[dict[str, Any]] = [
            {"messages": HI, "max_tokens": 3},
            {"messages": HI, "max_tokens": 40, "temperature": 0},
            {"messages": HI, "max_tokens": 20, "temperature": 1.2, "top_p": 0.8, "seed": 3, "n": 3},
            {"messages": [{"role": "user", "content": "wind " * 20}], "max_tokens": 9, "n": 2},
            {"messages": HI, "max_tokens": 9, "n": 2, "logprobs": True, "top_logprobs": 5},
        ]
        for body in bodies:
            status, answer, _ = served.post(CHAT, body)
            assert status == 200
            assert answer["usage"]["timings"]["compile_ms"] == 0
        assert "compiling" not in compiled
