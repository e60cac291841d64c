"""Whole programs that are ended at random moments, with all their caches, and started again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest
from api.tiny_models import write_endless

import phicore
from phicore.chat.conversation import Conversation, Turn
from phicore.chat.store import Store
from phicore.testing.tiny_models import Q4_K_M, Tiny, write_model

TRIES = int(os.environ.get("PHICORE_CHAOS_TRIES", "3"))
SEED = int(os.environ.get("PHICORE_CHAOS_SEED", "1"))
REQUESTS = [{"id": f"ü{i}", "prompt": "Hi", "seed": i, "max_tokens": 60} for i in range(24)]

pytestmark = [
    pytest.mark.complete,
    pytest.mark.skipif(os.name != "posix", reason="signals of POSIX"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("killed") / "tiny.gguf", Tiny(), Q4_K_M)


class Program:
    """A command whose caches are in a folder of its own."""

    def __init__(self, home: Path, *arguments: object) -> None:
        self.command = [sys.executable, "-m", "phicore", *map(str, arguments)]
        caches = {"XDG_CACHE_HOME": str(home), "PHICORE_PACKED_CACHE": "1GB"}
        self.environment = {**os.environ, **caches}
        self.environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def killed_after(self, seconds: float) -> bool:
        """Start the program, and kill it after this time; return whether it was still running."""
        process = subprocess.Popen(
            self.command,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        return False

    def run(self) -> tuple[str, float]:
        """Run the program to its end; return what it prints, and how long it took."""
        started = time.monotonic()
        done = subprocess.run(
            self.command, env=self.environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "Warning" not in done.stderr
        return done.stdout, time.monotonic() - started


def test_first_start_that_is_killed_at_any_time(tiny: Path, tmp_path: Path):
    """Kernels, programs, packed weights and JAX's cache are written when a model is first used."""
    options = ["generate", "-m", tiny, "-b", "jax", "-n", 20, "--seed", 1, "Hi"]
    expected, took_s = Program(tmp_path / "whole", *options).run()
    rng, killed = random.Random(SEED), 0
    for number in range(TRIES):
        program = Program(tmp_path / str(number), *options)
        killed += program.killed_after(rng.uniform(0.1, 0.95) * took_s)
        assert program.run()[0] == expected
    print(f"\n{killed} of {TRIES} starts were killed, in {took_s:.1f} s")
    assert killed >= TRIES // 3


def test_batch_that_is_killed_again_and_again_loses_no_answer(tiny: Path, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, REQUESTS)))
    options = ["generate", "-m", tiny, "-b", "numpy", "--batch", tmp_path / "in.jsonl"]
    _, took_s = Program(tmp_path, *options, "--out", tmp_path / "whole.jsonl").run()
    expected = set((tmp_path / "whole.jsonl").read_text("utf-8").splitlines())
    rng, killed = random.Random(SEED), 0
    for number in range(TRIES):
        out = tmp_path / f"{number}.jsonl"
        program, kept = Program(tmp_path, *options, "--out", out), list[str]()
        for _ in range(3):
            killed += program.killed_after(rng.uniform(0.2, 0.8) * took_s)
            data = out.read_bytes() if out.exists() else b""
            lines = data.decode("utf-8", "ignore").split("\n")[:-1]
            assert lines[: len(kept)] == kept
            kept = lines
        program.run()
        lines = out.read_text("utf-8").splitlines()
        assert lines[: len(kept)] == kept
        assert len(lines) == len(REQUESTS)
        assert set(lines) == expected
    print(f"\n{killed} of {3 * TRIES} runs were killed, in {took_s:.1f} s")
    assert killed >= TRIES


# ---- conversations -----------------------------------------------------------------------------

MESSAGES = ("Tell me of the sea", "and of the wind", "and more")
COMPLAINTS = ("Traceback", "Exception", "damaged", "is read again", "not saved", "another program")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[phicore.Model]:
    path = write_endless(tmp_path_factory.mktemp("killed") / "endless.gguf")
    with phicore.load(path, "numpy") as model:
        yield model


class Talk:
    """A conversation that `phicore chat` begins, and goes on with, in terminals.

    Attributes:
        finished: The turns that were finished when they were last looked at.
        took_s: How long the last program took until the first prompt, and from there to its end.
    """

    def __init__(self, model: phicore.Model, home: Path) -> None:
        self.model = model
        self.home = home
        self.finished: list[Turn] = []
        self.took_s = (0.0, 0.0)

    def read(self) -> Conversation:
        """Read what is kept."""
        store = Store(self.home / "chats", 10**9)
        names = store.names()
        assert len(names) <= 1
        return store.load(names[0]) if names else Conversation()

    def run(self, number: int = 0, after_s: float = 0.0, *, loaded: bool = False) -> bool:
        """Ask the questions and leave, and check what is kept; return whether a signal ended it.

        Args:
            number: The signal that is sent after a time; 0 is none.
            loaded: Whether the time begins at the first prompt.
        """
        import termios

        from cli.screen import terminal

        last = self.read().last
        shown = answered = int(last is not None)  # the last turn of a conversation is shown
        is_lost = last is not None and not last.answer
        options = ["-b", "numpy", "-n", 100, *["--resume"] * shown]
        with terminal("chat", "-m", self.model.path, *options, PHICORE_DATA=str(self.home)) as t:
            before = termios.tcgetattr(t._controller)
            timer = Timer(after_s, t.process.send_signal, [number])
            started_s = prompted_s = time.monotonic()
            if number and not loaded:
                timer.start()
            try:
                t.wait_for_prompt(1 + answered)
                prompted_s = time.monotonic()
                if number and loaded:
                    timer.start()
                assert ("/retry answers it" in t.text) == is_lost
                for message in MESSAGES:
                    t.enter(message)
                    t.wait_for_prompt(2 + answered)
                    answered += 1
                t.send("\x04")
            except AssertionError:
                if t.process.poll() is None:
                    raise
            code = t.end()
            timer.cancel()
            self.took_s = prompted_s - started_s, time.monotonic() - prompted_s
            assert code in (0, -number, 128 + number), t.text
            assert not any(complaint in t.text for complaint in COMPLAINTS), t.text
            if number != signal.SIGKILL:
                assert termios.tcgetattr(t._controller) == before
        self._check(answered - shown)
        return code != 0

    def _check(self, answered: int) -> None:
        """Check that all finished turns are kept, and that each answer is right, or its start."""
        talk, before = self.read(), self.finished
        self.finished = [turn for turn in talk.turns if turn.finish_reason != "interrupted"]
        assert self.finished[: len(before)] == before
        assert len(self.finished) >= len(before) + answered
        for turn in talk.turns:
            if turn not in before:
                messages = talk.messages_of(turn)
                right = self.model.generate(messages, seed=turn.seed, **turn.options).text()
                if turn in self.finished:
                    assert turn.answer == right
                assert right.startswith(turn.answer)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGHUP"])
def test_chat_that_is_ended_at_any_time_loses_no_turn(
    name: str, endless: phicore.Model, tmp_path: Path
):
    """It is ended while it loads, reads, answers, saves and leaves; then it goes on."""
    pytest.importorskip("pty", reason="terminals of POSIX")
    whole = Talk(endless, tmp_path / "whole")
    whole.run()
    rng, ended, lost = random.Random(SEED), 0, 0
    for number in range(TRIES):
        talk = Talk(endless, tmp_path / str(number))
        for loaded in (True, False, True):
            after_s = rng.uniform(0, 1) * whole.took_s[loaded]
            ended += talk.run(getattr(signal, name), after_s, loaded=loaded)
        talk.run()
        lost += sum(turn.is_lost for turn in talk.read().turns)
        [path] = talk.home.glob("chats/*.json")
        names = {path.name for path in talk.home.rglob("*") if path.is_file()}
        assert names == {"history", path.name, path.with_suffix(".rows").name}
    print(f"\n{ended} of {3 * TRIES} chats were ended, and {lost} answers lost")
    assert ended >= TRIES
