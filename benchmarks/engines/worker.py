"""A process that runs one engine and answers requests, and the class that asks it.

Each line of standard input is a request in JSON: the name of a function of `COMMANDS` and its
arguments. Each line of standard output is the answer; it is null if the engine has no member for
the request. The model is loaded once, before the first answer. All engines are timed by one piece
of code, on one list of pseudo-random tokens.

    cd benchmarks
    echo '["prefill", 128]' | python -m engines.worker phicore '{"model": "model.gguf"}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

FOLDER = Path(__file__).parents[1]


def about(engine: Any) -> str:
    """Describe the engine: its versions and the processor's features that it uses."""
    return engine.about()


def prefill(engine: Any, count: int) -> float:
    """Measure the seconds from a prompt of `count` tokens, uncached, to the first token.

    Two tokens come before it, untimed, since an engine that has slept is slow at first.
    """
    ids = prompt(engine, count)
    list(engine.tokens(ids[:1], 2))
    started = time.perf_counter()
    list(engine.tokens(ids, 1))
    return time.perf_counter() - started


def first_token(engine: Any, count: int) -> float:
    """Measure the seconds from a prompt to the first token, with nothing before it."""
    started = time.perf_counter()
    list(engine.tokens(prompt(engine, count), 1))
    return time.perf_counter() - started


def decode(engine: Any, steps: int, depth: int) -> float:
    """Measure the median seconds of a greedy step after `depth` prompt tokens and one new token."""
    return after(engine, steps, depth)[1]


def after(engine: Any, steps: int, depth: int) -> tuple[float, float]:
    """Measure the seconds of a prompt, and the median seconds of a greedy step after it."""
    ids = prompt(engine, depth)
    list(engine.tokens(ids[:1], 2))
    started = time.perf_counter()
    times = [time.perf_counter() for _ in engine.tokens(ids, 1 + steps)]
    return times[0] - started, float(np.median(np.diff(times)))


def decode_many(engine: Any, steps: int, count: int) -> float | None:
    """Measure the median seconds of a greedy step of `count` sequences, for one of them."""
    if not hasattr(engine, "steps"):
        return None
    prompts = [[id] for id in prompt(engine, count)]
    times = [time.perf_counter() for _ in engine.steps(prompts, 1 + steps)]
    return float(np.median(np.diff(times))) / count


def products(engine: Any) -> float | None:
    """Measure the seconds that the products of one token take alone."""
    return engine.products_s() if hasattr(engine, "products_s") else None


def live_bytes(engine: Any, position: int) -> int | None:
    """Return the bytes of keys and values that a step at this position reads."""
    return engine.live_bytes(position) if hasattr(engine, "live_bytes") else None


def save_logits(engine: Any, ids: list[int], path: str) -> bool | None:
    """Write the logits of tokens, (T, V) float32, to a file for `np.load`."""
    if not hasattr(engine, "logits"):
        return None
    np.save(path, engine.logits(ids))
    return True


def peak_bytes(_: Any) -> int:
    """Return the peak resident memory of this process, mapped pages of the file included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's peak would start at the memory of the parent process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def prompt(engine: Any, count: int) -> list[int]:
    return np.random.default_rng(0).integers(engine.vocab_size, size=count).tolist()


COMMANDS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        *(about, prefill, first_token, decode, after, decode_many, products, live_bytes),
        *(save_logits, peak_bytes),
    )
}


def answers(engine: Any, lines: Iterator[str]) -> Iterator[str]:
    """Yield the answer to each request, as a line of JSON."""
    for line in lines:
        command, *args = json.loads(line)
        yield json.dumps(COMMANDS[command](engine, *args))


def serve(name: str, options: str) -> None:
    """Make an engine and answer requests until standard input ends."""
    from engines import make

    found = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # send what libraries print to standard error, since it is no answer
    engine = make(name, json.loads(options))
    for answer in answers(engine, iter(sys.stdin)):
        print(answer, file=found, flush=True)


class EngineEnded(Exception):  # noqa: N818
    """The process of an engine has ended, for example because there was not enough memory."""


class Worker:
    """A process that runs an engine made with the given options; also a context manager."""

    def __init__(
        self, python: str, engine: str, options: Mapping[str, Any], threads: int | None = None
    ) -> None:
        """Start the process; it does not wait until the model is loaded.

        Args:
            threads: The number of threads of libraries that take it from the environment.
        """
        environment = dict(os.environ)
        path = [str(FOLDER), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        if threads is not None:
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
                environment[name] = str(threads)
        command = [python, "-m", "engines.worker", engine, json.dumps(options)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment
        )

    def ask(self, command: str, *args: Any) -> Any:
        """Run a function of `COMMANDS` in the process and return its result.

        Raises:
            EngineEnded: If the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # then readline returns nothing, which is handled below
            print(json.dumps([command, *args]), file=self._process.stdin, flush=True)
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        raise EngineEnded(f"its process ended with {self._process.wait()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        with suppress(BrokenPipeError):
            self._process.communicate()


if __name__ == "__main__":
    serve(*sys.argv[1:])
