"""Beginning and end of `phicore serve`, signals, and faults of the thread that computes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from server.conftest import HI, Served, ready, serving

import phicore
from phicore import Model
from phicore.errors import GGUFError

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
WAIT_S = 60


class Process:
    """`phicore serve` as a process.

    Attributes:
        url: The beginning of its addresses.
        lines: What it has written on standard error.
        clients: OpenAI's clients for it.
    """

    def __init__(self, *options: object, command: list[str] | None = None) -> None:
        command = command or [
            *(sys.executable, "-m", "phicore", "serve", "--port", "0", "-b", "numpy")
        ]
        self.process = subprocess.Popen(
            [*command, *map(str, options)], stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self.clients: list[openai.OpenAI] = []
        self.url = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening at (http://\S+)", line):
                self.url = found[1]
                break
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += self.process.stderr

    def health(self) -> int:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=WAIT_S).status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    def wait_until_ready(self) -> None:
        end = time.monotonic() + WAIT_S
        while self.health() != 200:
            assert time.monotonic() < end
            time.sleep(0.02)

    @property
    def client(self) -> openai.OpenAI:
        """Make a client, which is closed with the process."""
        made = openai.OpenAI(base_url=f"{self.url}/v1", api_key="k", max_retries=0, timeout=WAIT_S)
        self.clients.append(made)
        return made

    def ended(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and all of standard error."""
        code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return code, "".join(self.lines)


@contextmanager
def process(*options: object, command: list[str] | None = None) -> Iterator[Process]:
    made = Process(*options, command=command)
    try:
        yield made
    finally:
        for client in made.clients:
            client.close()
        made.process.kill()
        made.process.wait()
        made._reader.join(WAIT_S)
        assert made.process.stderr is not None
        made.process.stderr.close()


@posix
def test_sigterm_lets_answers_end_and_takes_no_new_ones(endless_path: Path):
    with process("-m", endless_path) as running:
        running.wait_until_ready()
        stream = running.client.chat.completions.create(
            model="endless", messages=HI, stream=True, max_tokens=300, temperature=0
        )
        first = next(iter(stream))
        running.process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert first.choices[0].delta.role == "assistant"
        assert rest[-1].choices[0].finish_reason == "length"
        code, said = running.ended()
        assert code == 0, said
        assert "Traceback" not in said


@posix
def test_after_the_grace_time_answers_are_cut_and_told_so(endless_path: Path):
    with process("-m", endless_path, "--grace", "0.2") as running:
        running.wait_until_ready()
        stream = running.client.chat.completions.create(
            model="endless", messages=HI, stream=True, max_tokens=15000, temperature=0
        )
        next(iter(stream))
        running.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        code, said = running.ended()
        assert code == 0, said


@posix
def test_interrupt_ends_an_idle_server_with_130(endless_path: Path):
    with process("-m", endless_path) as running:
        running.wait_until_ready()
        running.process.send_signal(signal.SIGINT)
        code, said = running.ended()
        assert code == 130, said
        assert "Traceback" not in said


@posix
def test_second_signal_ends_at_once(endless_path: Path):
    with process("-m", endless_path, "--grace", "1000") as running:
        running.wait_until_ready()
        stream = running.client.chat.completions.create(
            model="endless", messages=HI, stream=True, max_tokens=15000, temperature=0
        )
        next(iter(stream))
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        running.process.send_signal(signal.SIGTERM)
        code, said = running.ended()
        assert code == 0, said
        assert "Traceback" not in said


@posix
@pytest.mark.parametrize("pause_s", [0, 0.02])
def test_two_signals_end_an_idle_server_without_a_word(endless_path: Path, pause_s: float):
    """`uv run` hands a signal on that its child has had, too."""
    with process("-m", endless_path, "--log-level", "warning") as running:
        running.wait_until_ready()
        for _ in range(2):
            running.process.send_signal(signal.SIGTERM)
            time.sleep(pause_s)
        code, said = running.ended()
        assert code == 0, said
        assert len(said.splitlines()) == 1  # where it listens


def test_name_of_a_file_is_the_models_id_and_aliases_follow(endless_path: Path):
    with process("-m", endless_path, "--alias", "gpt-4o", "--log-format", "json") as running:
        names = [each.id for each in running.client.models.list()]  # also while it loads
        assert names == ["endless", "gpt-4o"]
        running.wait_until_ready()
        answer = running.client.chat.completions.create(model="gpt-4o", messages=HI, max_tokens=1)
        assert answer.model == "gpt-4o"
        running.process.terminate()
        _, said = running.ended()
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        assert any(line["message"] == "request" and line["status"] == 200 for line in lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--host: others can reach 0.0.0.0; give --api-key"),
        (["--host", "no.such.host.invalid", "--insecure"], "--host: no.such.host.invalid: "),
        (["--max-queue", "-1"], "--max-queue: expected 0 or more"),
        (["--time-limit", "0"], "--time-limit: expected more than 0"),
        (["--patience", "inf"], "--patience: expected more than 0, at most 1e+06, got inf"),
        (["--grace", "1e9"], "--grace: expected 0 to 1e+06, got 1000000000.0"),
        (["--api-key-file", "absent.txt"], "--api-key-file: absent.txt: No such file"),
        (["--api-key", ""], "--api-key: a key must not be empty"),
        (["--alias", ""], "--alias: a name must not be empty"),
        (["--allowed-host", "https://a.org"], "--allowed-host: expected a name without scheme"),
        (["--allowed-host", "a.org:443"], "--allowed-host: expected a name without scheme"),
        (["--cors-origin", "a.org"], "--cors-origin: expected a scheme, a host and perhaps a port"),
        (["--cors-origin", "https://a.org/"], "--cors-origin: expected a scheme, a host and"),
        (["--processes", "2", "--coordinator", "a"], "--coordinator: expected HOST:PORT"),
        (["--log-format", "xml"], "--log-format: expected text or json"),
        (["--prefix-cache", "big"], "--prefix-cache: expected a size such as 1GB"),
        (["--kv-memory", "big"], "--kv-memory: expected a size such as 4GB"),
        (["--no-speculation", "--draft-model", "m"], "--draft-model: not together with --no-"),
    ],
)
def test_wrong_option_is_one_line(options: list[str], said: str, tmp_path: Path):
    command = [sys.executable, "-m", "phicore", "serve", "--port", "0", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"phicore: {said}")


def test_draft_model_serves(tiny_path: Path):
    with process("-m", tiny_path, "--draft-model", tiny_path, "--warmup") as running:
        running.wait_until_ready()
        answer = running.client.chat.completions.create(
            model=tiny_path.stem, messages=HI, max_tokens=40, temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens_details is not None


def test_port_in_use_is_one_line(endless_path: Path):
    with process("-m", endless_path) as running:
        port = running.url.rpartition(":")[2]
        command = [sys.executable, "-m", "phicore", "serve", "-m", endless_path, "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 2
        assert f"--port: cannot listen at 127.0.0.1:{port}" in done.stderr


def test_model_that_cannot_be_loaded_is_one_line_and_ends_the_server(tmp_path: Path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but not really")
    with process("-m", path) as running:
        code, said = running.ended()
        assert code == 1
        assert said.splitlines()[-1].startswith("phicore: broken.gguf: ")
        assert "Traceback" not in said


def test_without_the_extra_a_line_says_what_to_install(endless_path: Path):
    program = (
        "import sys\n"
        "sys.modules['uvicorn'] = None\n"
        f"sys.argv = ['phicore', 'serve', '-m', {str(endless_path)!r}]\n"
        "from phicore.__main__ import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=WAIT_S
    )
    assert done.returncode == 1
    assert "pip install 'phicore[serve]'" in done.stderr


def test_keys_of_a_file_open(endless_path: Path, tmp_path: Path):
    keys = tmp_path / "keys.txt"
    keys.write_text("# who has it\nfirst\n\nk\n")
    options = ("-m", endless_path, "--host", "0.0.0.0", "--api-key-file", keys)
    with process(*options) as running:
        running.url = running.url.replace("0.0.0.0", "127.0.0.1")
        assert running.client.models.list().data
        with pytest.raises(openai.AuthenticationError):
            running.client.with_options(api_key="absent").models.list()


HALVES = [b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: a\r\n"]


@pytest.mark.parametrize(
    ("sent", "is_second"), [(b"", False), *((half, which) for half in HALVES for which in (0, 1))]
)
def test_connection_whose_request_does_not_come_is_closed(
    endless_path: Path, sent: bytes, is_second: bool
):
    with process("-m", endless_path, "--patience", "0.5") as running:
        port = int(running.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
            if is_second:
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(10) == b"HTTP/1.1 2"
            connection.sendall(sent)
            while connection.recv(65536):
                pass  # what is left of the first answer
        assert running.health() in (200, 503)


@posix
@pytest.mark.parametrize("path", ["/health", "/v1/completions", "/nothing"])
def test_connection_whose_body_goes_on_behind_the_answer_is_closed(endless_path: Path, path: str):
    """Each byte began the time for an idle connection anew."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n"
    with process("-m", endless_path, "--patience", "0.5") as running:
        port = int(running.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as connection:
            connection.sendall(head.encode())
            connection.settimeout(0.1)
            end = time.monotonic() + WAIT_S
            is_open = True
            while is_open:
                assert time.monotonic() < end, "the connection stays open"
                try:
                    connection.sendall(b" ")
                    is_open = connection.recv(65536) != b""
                except TimeoutError:
                    continue
                except OSError:
                    is_open = False
        assert running.health() in (200, 503)


# ---- while the model is loaded -------------------------------------------------------------


def test_while_the_model_is_loaded_the_server_answers(model: Model):
    go_on = threading.Event()

    def load() -> Model:
        go_on.wait(WAIT_S)
        return model

    with serving(load) as served:
        status, answer, headers = served.get("/health")
        assert status == 503
        assert answer["error"]["message"] == "Loading model"
        assert int(headers["retry-after"]) > 0
        assert [each.id for each in served.client.models.list()] == ["tiny", "other"]
        with pytest.raises(openai.InternalServerError) as error:
            served.client.chat.completions.create(model="tiny", messages=HI)
        assert error.value.status_code == 503
        go_on.set()
        served.wait_until(lambda: served.get("/health")[0] == 200, "loading")
        body = {"messages": HI, "max_tokens": 1}
        assert served.post("/v1/chat/completions", body)[0] == 200


def test_model_that_cannot_be_loaded_is_told_to_those_who_mount_the_application():
    failures: list[BaseException] = []

    def load() -> Model:
        raise GGUFError("damaged")

    with serving(load, failed=failures.append) as served:
        served.wait_until(lambda: bool(failures), "the failure")
        assert served.get("/health")[0] == 500
        assert served.post("/v1/chat/completions", {"messages": HI})[0] == 500


# ---- faults --------------------------------------------------------------------------------


def broken_steps(served: Served, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Let the next steps of the engine fail."""
    engine = served.service.worker.model.engine
    real, left = type(engine).step, [times]

    def step() -> Any:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("the device is on fire")
        return real(engine)

    monkeypatch.setattr(engine, "step", step)


@pytest.fixture
def two(endless_path: Path) -> Iterator[Served]:
    with phicore.load(endless_path, "numpy", max_sequences=2) as model, ready(model) as served:
        yield served


@pytest.mark.parametrize("stream", [False, True])
def test_fault_in_a_step_is_told_to_all_logged_once_and_the_server_goes_on(
    two: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
):
    results: list[Any] = []

    def ask() -> None:
        try:
            found: Any = two.client.chat.completions.create(
                model="tiny", messages=HI, max_tokens=15000, temperature=0, stream=stream
            )
            results.append(list(found))
        except openai.APIError as error:
            results.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    two.wait_for_rows(3)
    two.wait_until(lambda: sum(j.count > 0 for j in two.service.worker.jobs) == 2, "two answers")
    broken_steps(two, monkeypatch, 1)
    for thread in threads:
        thread.join(WAIT_S)
    assert len(results) == 3
    assert all(isinstance(result, openai.APIError) for result in results)
    assert not any("fire" in str(result) for result in results)
    assert sum("a step has failed" in record.getMessage() for record in caplog.records) == 1
    body = {"messages": HI, "max_tokens": 5, "temperature": 0}
    assert two.post("/v1/chat/completions", body)[0] == 200
    assert two.get("/health")[0] == 200
    two.wait_until(lambda: two.is_free, "the end")


def test_after_several_faults_the_server_says_that_it_is_broken(
    two: Served, monkeypatch: pytest.MonkeyPatch
):
    body = {"messages": HI, "max_tokens": 5}
    broken_steps(two, monkeypatch, 10)
    statuses = [two.post("/v1/chat/completions", body)[0] for _ in range(5)]
    assert statuses == [500] * 5
    assert two.service.state == "failed"
    assert two.get("/health")[0] == 500


def test_process_whose_engine_is_broken_ends_with_an_error(endless_path: Path):
    program = f"""
import sys
from phicore.engine import Engine
def step(self):
    raise SystemError("the device is on fire")
Engine.step = step
sys.argv = ["phicore", "serve", "-b", "numpy", "--port", "0", "-m", {str(endless_path)!r}]
from phicore.__main__ import main
main()
"""
    with process(command=[sys.executable, "-c", program]) as running:
        faults = 0
        while faults < 3:
            try:
                running.client.chat.completions.create(model="endless", messages=HI)
            except openai.InternalServerError as error:
                faults += error.status_code == 500
        code, said = running.ended()
        assert code == 1
        assert "the device is on fire" in said
