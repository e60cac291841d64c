"""Plugins that block, raise, exit, print or give wrong arrays, under a server that others use."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.tiny_models import write_tiny
from server.conftest import HI, Served, ready
from server.test_life import process
from unit.throwaway import Install, install

import phicore
from phicore.errors import PhicoreError
from phicore.plugins import Plugins, waiting
from phicore.server import Settings

__all__ = ["install"]

BODY: dict[str, Any] = {"messages": HI, "max_tokens": 5, "seed": 1, "ignore_eos": True}
CHAT = "/v1/chat/completions"
OBSERVER = """
    import sys, threading
    from phicore import hookimpl

    free, seen = threading.Event(), []

    @hookimpl
    def phicore_piece_generated(generation, piece):
        seen.append(piece.token_id)
        WHAT
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf")


@pytest.fixture
def expected(tiny: Path) -> Iterator[str]:
    """Return the text of the answer to `BODY` without plugins."""
    with phicore.load(tiny, "numpy") as model:
        yield model.generate(HI, max_tokens=5, seed=1, ignore_eos=True).text()


def observer(install: Install, what: str) -> Any:
    install("phicore-watcher", "watcher", OBSERVER.replace("WHAT", what))
    Plugins()  # imports it
    import importlib

    return importlib.import_module("throwaway_phicore_watcher")


def text_of(served: Served) -> str:
    status, answer, _ = served.post(CHAT, BODY)
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("what", ["1 / 0", "sys.exit(3)", "raise MemoryError"])
def test_observer_that_fails_is_named_and_stops_no_answer(
    install: Install, tiny: Path, expected: str, what: str, caplog: pytest.LogCaptureFixture
):
    observer(install, what)
    with phicore.load(tiny, "numpy") as model, ready(model) as served:
        assert [text_of(served) for _ in range(2)] == [expected] * 2
        assert served.get("/health")[0] == 200
    messages = [record.getMessage() for record in caplog.records]
    failed = "phicore-watcher:watcher: phicore_piece_generated failed; it is not called again"
    assert messages.count(failed) == 1


def test_observer_that_blocks_fails_the_answers_that_wait_and_is_named(
    install: Install, tiny: Path, expected: str, caplog: pytest.LogCaptureFixture
):
    module = observer(install, "if len(seen) == 2: free.wait(600)")
    with (
        phicore.load(tiny, "numpy") as model,
        ready(model, settings=Settings(plugin_limit=0.5)) as served,
    ):
        status, answer, _ = served.post(CHAT, BODY)
        assert (status, answer["error"]["code"]) == (503, "plugin_blocks")
        assert served.get("/health")[0] == 503
        assert served.post(CHAT, BODY)[0] == 503  # at once, and not when the time is over
        module.free.set()
        served.wait_until(lambda: served.get("/health")[0] == 200, "health")
        assert text_of(served) == expected
        served.wait_until(lambda: served.is_free, "the end of all answers")
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(told) == 1
    assert told[0].startswith("plugin phicore-watcher (throwaway_phicore_watcher.py, line ")
    assert "has not returned" in told[0]


def test_plugin_that_cannot_be_imported_is_told_when_the_server_starts(
    install: Install, tiny: Path, expected: str, caplog: pytest.LogCaptureFixture
):
    install("phicore-bad", "bad", "import sys; sys.exit('no licence')")
    install("phicore-ugly", "ugly", "1 / 0")
    with phicore.load(tiny, "numpy") as model, ready(model) as served:
        assert text_of(served) == expected
    told = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert told == [
        "plugin bad of phicore-bad is left out: SystemExit: no licence",
        "plugin ugly of phicore-ugly is left out: ZeroDivisionError: division by zero",
    ]


def test_what_a_plugin_prints_at_its_import_is_in_nobodys_output(
    install: Install, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    install("phicore-loud", "loud", "print('Welcome!')\nprint('Version 3')")
    Plugins()
    assert capsys.readouterr().out == ""
    assert "plugin phicore-loud:loud printed: Welcome! Version 3" in caplog.messages


WRONG = {
    "a column less": "tokens[:, 0]",
    "another type": "tokens.astype('float32')",
    "tokens that do not exist": "tokens * 0 + 10**6",
    "negative tokens": "tokens * 0 - 5",
    "nothing": "None",
    "an exit": "sys.exit(2)",
}
BACKEND = """
    import sys
    from phicore import hookimpl

    is_wrong = False

    def make(options):
        from phicore_numpy.backend import NumpyBackend

        class Wrong(NumpyBackend):
            def to_numpy(self, array):
                tokens = super().to_numpy(array)
                is_tokens = tokens.ndim == 2 and tokens.dtype.kind == "i" and tokens.shape[1] == 1
                return WRONG if is_wrong and is_tokens else tokens

        return Wrong(options)

    @hookimpl
    def phicore_register_backends(register):
        register("wrong", create=make, devices=lambda: ["cpu"], protocol=PROTOCOL)
"""


@pytest.mark.parametrize("what", WRONG)
def test_backend_that_gives_wrong_arrays_gives_an_error_and_never_a_text(
    install: Install, tiny: Path, expected: str, what: str, caplog: pytest.LogCaptureFixture
):
    import importlib

    from phicore.backend import VERSION

    code = BACKEND.replace("WRONG", WRONG[what]).replace("PROTOCOL", str(VERSION))
    install("phicore-wrong", "wrong", code)
    with phicore.load(tiny, "wrong") as model, ready(model) as served:
        assert text_of(served) == expected
        module = importlib.import_module("throwaway_phicore_wrong")
        module.is_wrong = True
        for _ in range(4):  # more than the faults after which the thread gives up
            status, answer, _ = served.post(CHAT, BODY)
            assert status == 500, answer
        module.is_wrong = False
        assert text_of(served) == expected  # the server goes on


def test_processor_that_exits_ends_its_own_answer_alone(tiny: Path):
    class Exits(phicore.LogitsProcessor):
        def update(self, token: int) -> dict[str, np.ndarray]:
            raise SystemExit(3)

        @classmethod
        def apply(cls, ops: Any, logits: Any, state: Any) -> Any:
            return logits

    with phicore.load(tiny, "numpy") as model:
        options = {"max_tokens": 5, "seed": 1, "ignore_eos": True}
        alone = model.generate(HI, **options).text()
        requests = [
            model.request(HI, **options),
            model.request(HI, processors=[Exits()], **options),
        ]
        good, bad = model.generate_many(requests, ordered=True)
    assert good.text == alone
    assert isinstance(bad.error, PhicoreError)
    assert "wanted to end the program (SystemExit(3))" in str(bad.error)


THREAD = """
    import threading, time
    from phicore import hookimpl

    def die():
        1 / 0

    @hookimpl
    def phicore_generation_started(generation):
        threading.Thread(target=die, name="uploads").start()
"""


def test_thread_of_a_plugin_that_ends_is_told_in_one_line(
    install: Install, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install("phicore-threads", "threads", THREAD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "phicore-threads"))
    said = "the thread uploads has ended: plugin phicore-threads failed: ZeroDivisionError"
    with process("-m", tiny) as server:
        server.wait_until_ready()
        server.client.chat.completions.create(model="tiny", messages=HI, max_tokens=5)
        end = time.monotonic() + 60
        while not any(said in line for line in server.lines):
            assert time.monotonic() < end, server.lines
            time.sleep(0.05)
        assert not any("Traceback" in line for line in server.lines)


SLOW = """
    import pathlib, time
    from phicore import hookimpl

    def block(place):
        if place == PLACE:
            pathlib.Path(HOME, "blocked").touch()
            while not pathlib.Path(HOME, "free").exists():
                time.sleep(0.01)

    block("import")

    def resolve(reference):
        from phicore.sources import ModelFiles

        block("resolve")
        return ModelFiles(pathlib.Path(reference.removeprefix("slow:")), None, reference)

    def create(options):
        from phicore_numpy.backend import NumpyBackend

        block("create")
        return NumpyBackend(options)

    @hookimpl
    def phicore_register_sources(register):
        block("hook")
        register("slow", resolve=resolve)

    def processor(argument, model):
        from phicore.network.processors import LogitBias

        block("processor")
        return LogitBias({})

    @hookimpl
    def phicore_register_logits_processors(register):
        register("slow", create=processor)

    @hookimpl
    def phicore_register_backends(register):
        register("slow", create=create, devices=lambda: ["cpu"], protocol=PROTOCOL)
"""
TOLD = {
    "import": "phicore-slow to be imported",
    "hook": "phicore-slow to return from phicore_register_sources",
    "resolve": "phicore-slow to resolve slow:",
    "create": "phicore-slow to create the backend slow",
    "processor": "phicore-slow to create the logits processor slow",
}


def filled(code: str, **values: object) -> str:
    """Put values, and the version of the protocol, in the places of their names."""
    from phicore.backend import VERSION

    for name, value in {**values, "PROTOCOL": VERSION}.items():
        code = code.replace(name, repr(value))
    return code


@pytest.fixture
def slow(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return a function that installs a plugin which blocks at a place, until `free` is there."""

    def call(place: str) -> None:
        install("phicore-slow", "slow", filled(SLOW, PLACE=place, HOME=str(tmp_path)))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "phicore-slow"))

    return call


def wait_for(condition: Callable[[], Any], what: object) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


@pytest.mark.parametrize("place", TOLD)
def test_plugin_that_is_waited_for_is_named_and_may_go_on(
    slow: Callable, place: str, tiny: Path, expected: str, tmp_path: Path, caplog, monkeypatch
):
    monkeypatch.setattr(waiting, "SLOW_S", 0.1)
    slow(place)
    said = f"still waiting for plugin {TOLD[place]}"

    def run() -> str:
        with phicore.load(f"slow:{tiny}", "slow") as model:
            options = {"max_tokens": 5, "seed": 1, "ignore_eos": True, "processors": ["slow"]}
            return model.generate(HI, **options).text()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        wait_for(lambda: any(m.startswith(said) for m in caplog.messages), caplog.messages)
        (tmp_path / "free").touch()
        assert running.result() == expected
    [told] = [m for m in caplog.messages if m.startswith(said)]
    assert "(throwaway_phicore_slow.py, line " in told


@contextmanager
def started(command: str, tiny: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a command with the model and the backend of the plugin that blocks."""
    given = ["--port", "0"] if command == "serve" else ["--processor", "slow", "-n", "1", "Hi"]
    line = [sys.executable, "-m", "phicore", command, "-m", f"slow:{tiny}", "-b", "slow", *given]
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as program:
        try:
            yield program
        finally:
            program.kill()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("command", "place"),
    [
        *(("generate", place) for place in TOLD),
        *(("serve", place) for place in TOLD if place != "processor"),
    ],
)
def test_interrupt_ends_a_program_that_waits_for_a_plugin(
    slow: Callable, command: str, place: str, tiny: Path, tmp_path: Path
):
    slow(place)
    with started(command, tiny) as program:
        wait_for((tmp_path / "blocked").exists, "the plugin blocks")
        program.send_signal(signal.SIGINT)
        _, said = program.communicate(timeout=60)
    assert program.returncode == 130, said
    assert "Traceback" not in said


@pytest.mark.complete
@pytest.mark.parametrize("place", ["resolve", "create"])
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_user_sees_which_plugin_a_program_waits_for(
    slow: Callable, command: str, place: str, tiny: Path, tmp_path: Path
):
    slow(place)
    with started(command, tiny) as program:
        assert program.stderr is not None
        told = next(line for line in program.stderr if "still waiting for plugin" in line)
        assert TOLD[place] in told
        (tmp_path / "free").touch()
        if command == "serve":
            assert any(" ready " in line for line in program.stderr)
        else:
            assert program.wait(timeout=60) == 0


HOLDER = """
    import ctypes
    from phicore import hookimpl

    library = ctypes.PyDLL(LIBRARY)  # its functions are called with the interpreter's lock

    def hold():
        library.hold(FREE)

    def create(options):
        from phicore_numpy.backend import NumpyBackend

        if PLACE == "create":
            hold()
        return NumpyBackend(options)

    @hookimpl
    def phicore_register_backends(register):
        register("holder", create=create, devices=lambda: ["cpu"], protocol=PROTOCOL)

    @hookimpl
    def phicore_piece_generated(generation, piece):
        if PLACE == "observer":
            hold()
"""


@pytest.fixture
def holder(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Return a function that installs a plugin with C code, which holds until `free` is there."""
    if shutil.which("cc") is None:
        pytest.skip("install a C compiler (cc) to test plugins with C code")

    def call(place: str) -> None:
        library = str(tmp_path / "holds.so")
        source = Path(__file__).with_name("holds.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        free = bytes(tmp_path / "free")
        install("phicore-holder", "holder", filled(HOLDER, LIBRARY=library, FREE=free, PLACE=place))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "phicore-holder"))

    return call


def is_silent(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=0.5):
            return False
    except TimeoutError:
        return True


@pytest.mark.parametrize("place", ["create", "observer"])
def test_code_in_c_that_keeps_the_lock_is_told_by_the_stacks_of_all_threads(
    holder: Callable, place: str, tiny: Path, expected: str, tmp_path: Path
):
    """No thread of Python can answer meanwhile, so /health is silent: a supervisor notices that."""
    holder(place)
    with (
        ThreadPoolExecutor(1) as pool,
        process("-m", tiny, "-b", "holder", "--plugin-limit", "1") as server,
    ):
        ask = partial(
            server.client.chat.completions.create,
            model="tiny",
            messages=HI,
            max_tokens=5,
            seed=1,
            extra_body={"ignore_eos": True},
        )
        if place == "observer":
            server.wait_until_ready()
            asked = pool.submit(ask)
        wait_for(lambda: "Timeout (0:00:01)!\n" in server.lines, server.lines)
        wait_for(lambda: any(" in hold\n" in line for line in server.lines), server.lines)
        [told] = [line for line in server.lines if " in hold\n" in line]
        assert "throwaway_phicore_holder.py" in told
        assert is_silent(server.url)
        (tmp_path / "free").touch()
        server.wait_until_ready()
        said = "no thread could run Python code for "
        wait_for(lambda: any(said in line for line in server.lines), server.lines)
        answer = asked.result() if place == "observer" else ask()
        assert answer.choices[0].message.content == expected
