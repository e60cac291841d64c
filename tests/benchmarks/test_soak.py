"""A short soak: `benchmarks/soak.py` with few clients, on a tiny model with a window."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.complete
def test_every_answer_of_a_crowded_server_is_that_of_the_request_alone():
    options = "--model tiny --clients 12 --minutes 0.4 --requests 24 --longest 300 --limit 600"
    done = subprocess.run(
        [sys.executable, SOAK, *options.split()], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == {}
    assert sum(found["compared"].values()) > 24  # beside those that were sent one after the other
    assert {"running", "waiting", "kv_bytes"} <= found["rests"][-1].keys()
    assert [found["rests"][-1][name] for name in ("running", "waiting", "kv_bytes")] == [0, 0, 0]


def test_streams_are_put_together_to_what_whole_answers_tell():
    import importlib

    soak_requests = importlib.import_module("soak_requests")
    token = {"token": "a", "bytes": [97], "logprob": -1.00001, "top_logprobs": []}
    call = {"function": {"name": "steer", "arguments": '{"degrees":1}'}}
    message = {"content": "ab", "tool_calls": [call]}
    whole = {"message": message, "finish_reason": "stop", "logprobs": {"content": [token]}}
    joined = soak_requests.Joined(1)
    for delta, more in (
        ({"content": "a"}, {"logprobs": {"content": [token]}}),
        ({"content": "b"}, {}),
        ({"tool_calls": [{"index": 0, "function": {"name": "steer", "arguments": ""}}]}, {}),
        ({"tool_calls": [{"index": 0, "function": {"arguments": '{"degrees":1}'}}]}, {}),
        ({}, {"finish_reason": "stop"}),
    ):
        joined.add({"choices": [{"index": 0, "delta": delta, **more}]})
    told = soak_requests.told({"choices": [whole]})
    assert joined.choices == told
    assert soak_requests.are_same(told, told)
    for change, is_same in ((1e-6, True), (1e-3, False)):
        token["logprob"] = -1.00001 - change
        assert soak_requests.are_same(soak_requests.told({"choices": [whole]}), told) == is_same
    token["logprob"], message["content"] = -1.00001, "aB"
    assert not soak_requests.are_same(soak_requests.told({"choices": [whole]}), told)
