"""Clients that go away, read slowly, or find the queue full."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import openai
import pytest
from server.conftest import ENDLESS, HI, Served

from phicore.server.service import QUICK

REQUEST: dict[str, Any] = {"messages": HI, **ENDLESS}


def connect(
    served: Served,
    body: dict[str, Any],
    buffer: int | None = None,
    path: str = "/v1/chat/completions",
) -> socket.socket:
    """Send a request by hand, and return the socket."""
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(served.address)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + data)
    return connection


def read_until(connection: socket.socket, what: bytes) -> bytes:
    found = b""
    connection.settimeout(60)
    while what not in found:
        part = connection.recv(65536)
        assert part, found
        found += part
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_while_its_answer_is_computed_frees_its_row(
    endless: Served, stream: bool
):
    connection = connect(endless, {**REQUEST, "stream": stream})
    if stream:
        read_until(connection, b'"content":"')
    worker = endless.service.worker
    endless.wait_until(lambda: any(job.count > 3 for job in worker.jobs), "an answer")
    connection.close()
    endless.wait_until(lambda: endless.is_free, "the end")


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_while_it_waits_leaves_the_queue(endless: Served, stream: bool):
    running = [connect(endless, {**REQUEST, "stream": True}) for _ in range(2)]
    endless.wait_for_rows(2)
    waiting = connect(endless, {**REQUEST, "stream": stream})
    endless.wait_for_rows(3)
    waiting.close()
    endless.wait_for_rows(2)
    for connection in running:
        read_until(connection, b'"content":"')
        connection.close()
    endless.wait_until(lambda: endless.is_free, "the end")


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_while_its_prompt_is_read_frees_its_row(
    endless: Served, stream: bool
):
    prompt = [{"role": "user", "content": "The sea. " * 2000}]
    connection = connect(endless, {**REQUEST, "messages": prompt, "stream": stream})
    worker = endless.service.worker
    endless.wait_until(lambda: any(job.generation for job in worker.jobs), "reading")
    connection.close()
    endless.wait_until(lambda: endless.is_free, "the end")
    # Reading the whole prompt takes far longer than a chunk, and no token was written.
    assert b"vllm:num_requests_running" in endless.service.metrics.text(None)


def test_full_queue_is_a_503_that_says_when_to_try_again(endless: Served):
    connections = [connect(endless, {**REQUEST, "stream": True}) for _ in range(4)]
    endless.wait_for_rows(4)
    status, answer, headers = endless.post("/v1/chat/completions", REQUEST)
    assert status == 503
    assert answer["error"]["code"] == "queue_full"
    assert int(headers["retry-after"]) > 0
    with pytest.raises(openai.InternalServerError) as error:
        endless.client.chat.completions.create(model="tiny", messages=HI, stream=True)
    assert error.value.status_code == 503
    for connection in connections:
        connection.close()
    endless.wait_until(lambda: endless.is_free, "the end")
    body = {"messages": HI, "max_tokens": 2}
    assert endless.post("/v1/chat/completions", body)[0] == 200


def test_more_choices_than_the_queue_ever_holds_are_a_400(endless: Served):
    status, answer, _ = endless.post("/v1/chat/completions", {**REQUEST, "n": 5})
    assert status == 400
    assert answer["error"]["param"] == "n"


class Slow:
    """Stands for a function that takes long: it ends when somebody says so."""

    def __init__(self, result: Any) -> None:
        self.calls = 0
        self.may_end = threading.Event()
        self._result = result

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        assert self.may_end.wait(60)
        return self._result


def test_client_that_goes_away_before_its_text_is_looked_at_leaves_the_queue(
    endless: Served, monkeypatch: pytest.MonkeyPatch
):
    """What nobody waited for any more was computed all the same, for hours if somebody liked."""
    service, slow = endless.service, Slow("a")
    monkeypatch.setattr(service.model, "render", slow)
    waiting = [connect(endless, {"messages": HI}, path="/apply-template") for _ in range(6)]
    endless.wait_until(lambda: service._preparing == 6, "six requests")
    for connection in waiting:
        connection.close()
    endless.wait_until(lambda: service._preparing == 2, "those that have begun")
    slow.may_end.set()
    endless.wait_until(lambda: service._preparing == 0, "the end")
    assert slow.calls == 2


def test_requests_whose_texts_wait_are_limited(endless: Served, monkeypatch: pytest.MonkeyPatch):
    """Each holds its body, and nothing bounded how many there were."""
    service, slow = endless.service, Slow("a")
    monkeypatch.setattr(service.model, "render", slow)
    most = service._most(service.model) + QUICK
    waiting = [connect(endless, {"messages": HI}, path="/apply-template") for _ in range(most)]
    endless.wait_until(lambda: service._preparing == most, "as many as there may be")
    status, answer, headers = endless.post("/apply-template", {"messages": HI})
    assert (status, answer["error"]["code"]) == (503, "queue_full")
    assert int(headers["retry-after"]) > 0
    slow.may_end.set()
    for connection in waiting:
        read_until(connection, b'{"prompt":"a"}')
        connection.close()
    assert endless.post("/apply-template", {"messages": HI})[0] == 200


def test_prompts_are_scored_no_more_for_a_client_that_has_gone_away(
    endless: Served, monkeypatch: pytest.MonkeyPatch
):
    """All of up to 128 prompts were scored, and no answer was computed meanwhile."""
    service, slow = endless.service, Slow([None, None])
    monkeypatch.setattr(service.model, "score", slow)
    body = {"prompt": [[5, 6]] * 100, "echo": True, "logprobs": 0, "max_tokens": 0}
    connection = connect(endless, body, path="/v1/completions")
    endless.wait_until(lambda: slow.calls == 1, "the first prompt")
    connection.close()
    assert endless.get("/health")[0] == 200  # the server has seen meanwhile that it is closed
    slow.may_end.set()
    endless.wait_until(lambda: service._preparing == 0, "the end")
    assert slow.calls < 5


def test_time_limit_holds_for_what_is_done_before_the_answer(
    endless: Served, monkeypatch: pytest.MonkeyPatch
):
    service, slow = endless.service, Slow("a")
    monkeypatch.setattr(service.model, "render", slow)
    object.__setattr__(service.settings, "time_limit", 0.2)
    try:
        status, answer, _ = endless.post("/apply-template", {"messages": HI})
    finally:
        object.__setattr__(service.settings, "time_limit", 3600.0)
        slow.may_end.set()
    assert status == 504
    assert "longer than the server allows" in answer["error"]["message"]


def test_slow_reader_stalls_nobody_and_its_buffer_is_bounded(
    endless: Served, monkeypatch: pytest.MonkeyPatch
):
    import phicore.server.jobs as jobs

    monkeypatch.setattr(jobs, "MOST_UNREAD", 200)
    with connect(endless, {**REQUEST, "stream": True}, buffer=2048) as slow:
        read_until(slow, b'"content":"')
        [job] = endless.service.worker.jobs
        others = 0
        while not job.is_cancelled:  # the other client gets its answers meanwhile
            body = {"messages": HI, "max_tokens": 3, "seed": others}
            status, answer, _ = endless.post("/v1/chat/completions", body)
            assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
            others += 1
        assert len(job.pieces) <= 201
        assert job.exchange.error is not None
        assert "slowly" in str(job.exchange.error)
        endless.wait_until(lambda: endless.is_free, "the end")


def test_silent_stream_gets_comments(endless: Served):
    """While both rows are taken, a third client's stream is kept open by comments."""
    object.__setattr__(endless.service.settings, "ping", 0.05)
    running = [connect(endless, {**REQUEST, "stream": True}) for _ in range(2)]
    endless.wait_for_rows(2)
    waiting = connect(endless, {**REQUEST, "stream": True})
    found = read_until(waiting, b": keep-alive\n\n")
    assert b'"role":"assistant"' in found
    assert b'"content":"",' not in found.partition(b": keep-alive")[2]
    for connection in [*running, waiting]:
        connection.close()
    endless.wait_until(lambda: endless.is_free, "the end")
