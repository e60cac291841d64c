"""A worker process that runs llama.cpp or phicore on the CPU, for `vs_llama_cpp.py`.

Each line of standard input is a request in JSON: the name of a function of `COMMANDS` and its
arguments. Each line of standard output is the answer. The model is loaded once, before the first
answer. Both engines are timed by one piece of code, on one list of pseudo-random tokens.

    echo '["prefill", 128]' | python benchmarks/engines.py phicore '{"model": "model.gguf"}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np

BATCH = 512
PORTABLE_BUILD = (
    'CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON '
    "-DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_BF16=ON "
    '-DGGML_AVX_VNNI=ON"'
)


class LlamaCpp:
    """llama.cpp, called through its C functions, since its Python class makes needless copies."""

    def __init__(self, **options: Any) -> None:
        import llama_cpp

        self._c = llama_cpp
        self._options = {"n_batch": BATCH, "verbose": False, **options}
        self._llama = llama_cpp.Llama(**self._options)
        self.vocab_size = self._llama.n_vocab()

    def about(self) -> str:
        features = self._c.llama_print_system_info().decode().partition(":")[2].split("|")
        used = " ".join(f.split()[0] for f in features if f.split()[-1:] == ["1"])
        return f"llama-cpp-python {self._c.__version__} ({used})"

    def tokens(self, ids: list[int], count: int) -> Iterator[int]:
        """Yield `count` greedily chosen tokens after `ids`."""
        self._c.llama_memory_clear(self._c.llama_get_memory(self._llama.ctx), False)
        for _ in range(count):
            ids = [self._next(ids)]
            yield ids[0]

    def _next(self, ids: list[int]) -> int:
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            array = (self._c.llama_token * len(part))(*part)
            batch = self._c.llama_batch_get_one(array, len(part))
            if status := self._c.llama_decode(self._llama.ctx, batch):
                raise RuntimeError(f"llama_decode: {status}")
        scores = self._c.llama_get_logits_ith(self._llama.ctx, -1)
        return int(np.ctypeslib.as_array(scores, (self.vocab_size,)).argmax())

    def steps(self, prompts: list[list[int]], count: int) -> Iterator[None]:
        """Yield after each of `count` greedy steps of several sequences at once.

        Prompts have one token. Every sequence has its own part of the context, the library's
        default.
        """
        c, most = self._c, len(prompts)
        params = c.llama_context_default_params()
        for name in ("n_threads", "n_threads_batch", "flash_attn_type"):
            setattr(params, name, getattr(self._llama.context_params, name))
        params.n_seq_max, params.n_ctx = most, most * 256
        context = c.llama_init_from_model(self._llama.model, params)
        batch = c.llama_batch_init(most, 0, 1)
        try:
            tokens = [prompt[0] for prompt in prompts]
            for position in range(count):
                batch.n_tokens = most
                for row, token in enumerate(tokens):
                    batch.token[row], batch.pos[row] = token, position
                    batch.n_seq_id[row], batch.seq_id[row][0] = 1, row
                    batch.logits[row] = 1
                if status := c.llama_decode(context, batch):
                    raise RuntimeError(f"llama_decode: {status}")
                tokens = []
                for row in range(most):
                    scores = c.llama_get_logits_ith(context, row)
                    found = np.ctypeslib.as_array(scores, (self.vocab_size,)).argmax()
                    tokens.append(int(found))
                yield
        finally:
            c.llama_batch_free(batch)
            c.llama_free(context)

    def logits(self, ids: list[int]) -> np.ndarray:
        llama = self._c.Llama(**self._options, logits_all=True)
        llama.eval(ids)
        return llama.scores[: len(ids)]


class Phicore:
    """phicore on one of its backends."""

    def __init__(self, model: str, backend: str = "jax", **options: Any) -> None:
        import phicore

        self._model = phicore.load(model, backend, device="cpu", prefix_cache_bytes=0, **options)
        self.vocab_size = self._model.vocab_size

    def about(self) -> str:
        return f"phicore {version('phicore')} (jax {version('jax')})"

    def tokens(self, ids: list[int], count: int) -> Iterator[int]:
        """Return an iterator over `count` greedily chosen tokens after `ids`."""
        generation = self._model.generate(
            ids, max_tokens=count, temperature=0, repeat_penalty=1, seed=0, ignore_eos=True
        )
        return (piece.token_id for piece in generation)

    def steps(self, prompts: list[list[int]], count: int) -> Iterator[None]:
        """Yield after each of `count` greedy steps of several sequences at once."""
        engine = self._model.engine
        options = {"temperature": 0, "repeat_penalty": 1, "seed": 0, "ignore_eos": True}
        with ExitStack() as stack:
            generations = [
                stack.enter_context(self._model.generate(ids, max_tokens=256, **options))
                for ids in prompts
            ]
            while not all(len(g.token_ids) > 2 for g in generations):  # all run by now
                engine.step()
            for _ in range(count):
                engine.step()
                yield

    def logits(self, ids: list[int]) -> np.ndarray:
        return self._model.logits(ids)


Engine = LlamaCpp | Phicore
ENGINES: dict[str, type[Engine]] = {"llama.cpp": LlamaCpp, "phicore": Phicore}


def about(engine: Engine) -> str:
    """Describe the engine: its versions and, for llama.cpp, the CPU features that it uses."""
    return engine.about()


def prefill(engine: Engine, count: int) -> float:
    """Measure the seconds from a prompt of `count` tokens, uncached, to the first token."""
    ids = _prompt(engine, count)
    started = time.perf_counter()
    list(engine.tokens(ids, 1))
    return time.perf_counter() - started


def decode(engine: Engine, steps: int, depth: int) -> float:
    """Measure the median seconds of a greedy step after `depth` prompt tokens and one new token."""
    times = [time.perf_counter() for _ in engine.tokens(_prompt(engine, depth), 1 + steps)]
    return float(np.median(np.diff(times)))


def decode_many(engine: Engine, steps: int, count: int) -> float:
    """Measure the median seconds of a greedy step of `count` sequences, for one of them."""
    prompts = [[id] for id in _prompt(engine, count)]
    times = [time.perf_counter() for _ in engine.steps(prompts, 1 + steps)]
    return float(np.median(np.diff(times))) / count


def save_logits(engine: Engine, count: int, path: str) -> None:
    """Write the logits of `count` tokens, (count, V) float32, to a file for `np.load`."""
    np.save(path, engine.logits(_prompt(engine, count)))


def peak_bytes(_: Engine) -> int:
    """Return the peak resident memory of this process, mapped pages of the file included."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's peak would start at the memory of the parent process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _prompt(engine: Engine, count: int) -> list[int]:
    return np.random.default_rng(0).integers(engine.vocab_size, size=count).tolist()


COMMANDS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (about, prefill, decode, decode_many, save_logits, peak_bytes)
}


def serve(name: str, options: str) -> None:
    """Make an engine and answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # send what libraries print to standard error, since it is no answer
    engine = ENGINES[name](**json.loads(options))
    for line in sys.stdin:
        command, *args = json.loads(line)
        print(json.dumps(COMMANDS[command](engine, *args)), file=answers, flush=True)


class Worker:
    """A process that runs an engine made with the given options; also a context manager."""

    def __init__(self, python: str, engine: str, **options: Any) -> None:
        self._engine = engine
        command, pipe = [python, __file__, engine, json.dumps(options)], subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def ask(self, command: str, *args: Any) -> Any:
        """Run a function of `COMMANDS` in the process and return its result.

        If the process has ended, this program exits with a message.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # then readline returns nothing, which is handled below
            print(json.dumps([command, *args]), file=self._process.stdin, flush=True)
        if answer := self._process.stdout.readline():
            return json.loads(answer)
        status = self._process.wait()
        is_crash = status < 0 and self._engine == "llama.cpp"
        hint = f"; if the CPU has AMX, build it with {PORTABLE_BUILD}" if is_crash else ""
        sys.exit(f"{self._engine}: its process ended with {status}{hint}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    serve(*sys.argv[1:])
