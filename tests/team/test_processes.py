"""Tests that processes which share a model compute the text of one process, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openai
import pytest

import phicore
from phicore.team.protocol import KEY

pytest.importorskip("jax", reason="install phicore-jax")

WAIT_S = 200
WORDS = ["the", "sea", "and", "the", "wind", "and", "of", "the", "ice", "in", "the", "land"]
BACKEND = ("-b", "jax", "--device", "cpu")


class Process:
    """The program `phicore`, whose output is read while it runs."""

    def __init__(self, *args: object, **env: str) -> None:
        command = [sys.executable, "-m", "phicore", *map(str, args)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        )
        self.out = self.err = ""
        threads = [threading.Thread(target=self._read, args=(n,)) for n in ("out", "err")]
        for thread in threads:
            thread.start()
        self._threads = threads

    def _read(self, name: str) -> None:
        stream = getattr(self.process, f"std{name}")
        for line in iter(stream.readline, b""):
            setattr(self, name, getattr(self, name) + line.decode(errors="replace"))
        stream.close()

    def end(self) -> int:
        code = self.process.wait(WAIT_S)
        for thread in self._threads:
            thread.join(WAIT_S)
        return code

    def wait_for(self, pattern: str) -> str:
        until = time.monotonic() + WAIT_S
        while not (found := re.search(pattern, self.err)):
            assert self.process.poll() is None, self.err
            assert time.monotonic() < until, self.err
            time.sleep(0.05)
        return found[1]

    def reason(self) -> str:
        """Return the line that says why it has ended."""
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("phicore: ")]
        return line


@contextmanager
def processes() -> Iterator[Any]:
    """Yield a function that starts processes, which end with the block."""
    started: list[Process] = []

    def start(*args: object, **env: str) -> Process:
        started.append(Process(*args, **env))
        return started[-1]

    try:
        yield start
    finally:
        for each in started:
            if each.process.poll() is None:
                each.process.kill()
            each.end()
            print(each.err, file=sys.stderr)  # pytest shows this if a test fails


def team_of(count: int, address: str) -> list[object]:
    return [*BACKEND, "--devices", count, "--processes", count, "--coordinator", address]


@contextmanager
def server(model: Path, address: str, *options: object) -> Iterator[tuple[Any, Process, Process]]:
    """Yield a client of a server of two processes, and both processes."""
    with processes() as start:
        leader = start(
            "serve", "-m", model, "--port", 0, "--any-model", *team_of(2, address), *options
        )
        follower = start("join", address, "-m", model)
        url = leader.wait_for(r"listening at (http://\S+)")
        leader.wait_for(r"(ready)")
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0), leader, follower


def ask(client: Any, seed: int, **options: Any) -> Any:
    given: dict[str, Any] = {"max_tokens": 3 + seed % 9, "temperature": seed % 2, "seed": seed}
    return client.completions.create(
        model="tiny", prompt=" ".join(WORDS[: 1 + seed % 11]), **{**given, **options}
    )


@pytest.mark.complete
def test_server_of_two_processes_answers_like_one(tiny: Path, address: str) -> None:
    """Several at once, one of whom goes away."""
    with server(tiny, address, "--parallel", 2) as (client, leader, follower):
        texts: dict[int, str] = {}

        def run(seed: int) -> None:
            if seed == 3:  # goes away
                for n, _ in enumerate(ask(client, seed, max_tokens=300, stream=True)):
                    if n == 2:
                        break
                return
            texts[seed] = ask(client, seed).choices[0].text

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        leader.process.send_signal(signal.SIGTERM)
        assert (leader.end(), follower.end()) == (0, 0), (leader.err, follower.err)
    assert len(texts) == 4
    with phicore.load(tiny, "numpy") as model:
        for seed, text in texts.items():
            given: dict[str, Any] = {"max_tokens": 3 + seed % 9, "temperature": seed % 2}
            prompt = " ".join(WORDS[: 1 + seed % 11])
            assert model.generate(prompt, raw=True, seed=seed, **given).text() == text


@pytest.mark.complete
def test_follower_that_dies_ends_the_server(endless: Path, address: str) -> None:
    with server(endless, address) as (client, leader, follower):
        stream = ask(client, 1, max_tokens=3000, temperature=0, stream=True)
        next(stream)
        follower.process.kill()
        with suppress(Exception):  # of the library that openai uses
            list(stream)
        assert leader.end() == 1
        assert "process 1 of the team: it is gone" in leader.err


@pytest.mark.complete
def test_leader_that_dies_ends_the_follower(endless: Path, address: str) -> None:
    with server(endless, address) as (client, leader, follower):
        stream = ask(client, 1, max_tokens=3000, temperature=0, stream=True)
        next(stream)
        leader.process.kill()
        assert follower.end() != 0
        # JAX may notice it first, and says that another task has died.
        assert re.search("the process that leads the team is gone|another task died", follower.err)


def test_generate_with_two_processes(tiny: Path, address: str) -> None:
    prompt = ("the sea", "--raw", "-n", 12, "--seed", 3, "--json")
    with processes() as start:
        follower = start("join", address, "-m", tiny)  # comes first, and waits
        leader = start("generate", "-m", tiny, *team_of(2, address), *prompt)
        assert (leader.end(), follower.end()) == (0, 0), (leader.err, follower.err)
        with phicore.load(tiny, "numpy") as model:
            alone = model.generate("the sea", raw=True, max_tokens=12, seed=3)
            assert json.loads(leader.out)["text"] == alone.text()


def test_model_that_cannot_be_shared_is_told_by_both(tiny: Path, address: str) -> None:
    with processes() as start:
        leader = start("generate", "-m", tiny, *team_of(3, address), "x")
        followers = [start("join", address, "-m", tiny) for _ in range(2)]
        assert leader.end() == 1
        assert "devices: 3 cannot share" in leader.reason()
        for follower in followers:
            assert follower.end() != 0


@pytest.mark.complete
def test_other_file_is_told_to_both(tiny: Path, endless: Path, address: str) -> None:
    with processes() as start:
        leader = start("generate", "-m", tiny, *team_of(2, address), "x")
        follower = start("join", address, "-m", endless)
        assert (leader.end(), follower.end()) == (1, 1)
        assert "not the file that the process has which leads" in follower.reason()
        assert "process 1 of the team: " in leader.err
        assert "not the file" in leader.err


def test_other_key_is_turned_away(tiny: Path, address: str) -> None:
    with processes() as start:
        leader = start("generate", "-m", tiny, *team_of(2, address), "x")
        stranger = start("join", address, "-m", tiny, **{KEY: "another"})
        assert stranger.end() == 2
        assert "the leader has another key" in stranger.reason()
        assert leader.process.poll() is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--processes", 2], "--coordinator: several processes need an address to meet at"),
        (["--coordinator", "127.0.0.1:7000"], "--coordinator: only with --processes"),
        (["--processes", 2, "--coordinator", "7000"], "--coordinator: expected HOST:PORT"),
        (["--processes", 0], "--processes: expected 1 to 1024, got 0"),
        (
            ["--processes", 2, "--coordinator", "127.0.0.1:7000", "--speculation"],
            "--speculation: not with several processes",
        ),
        (
            ["--processes", 2, "--coordinator", "127.0.0.1:7000", "-b", "numpy"],
            "backend numpy: one process computes a model",
        ),
        (
            ["--processes", 2, "--coordinator", "192.0.2.1:7000"],
            "--coordinator: cannot listen at 192.0.2.1:7000",
        ),
    ],
)
def test_wrong_options_are_told(tiny: Path, options: list[object], problem: str) -> None:
    with processes() as start:
        found = start("generate", "-m", tiny, *options, "x")
        assert found.end() in (1, 2)
        assert problem in found.reason()
