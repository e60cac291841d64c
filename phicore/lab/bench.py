"""The benchmark behind `phicore bench`: the speed of reading prompts and of generating tokens.

Every figure is measured with `Model.generate`, with greedy sampling, without stopping at end
tokens, and without the time for compiling. Rows are measured in turn, so that a slow minute of the
machine affects all of them.

Generating a token reads all weights once, so memory bandwidth limits the speed on a CPU. The
bandwidth is therefore measured too, in turn with the rows.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from phicore.backend import NUM_EXPERTS_PER_TOK
from phicore.backend.host import cpu_count
from phicore.engine import Engine, Request, Timings
from phicore.engine.scheduler import SIZES
from phicore.errors import ArgumentError
from phicore.gguf.reader import GGUFTensor, open_gguf
from phicore.lab.interrupts import swallowed_interrupts
from phicore.lab.machine import MemoryBandwidth, cpu_name
from phicore.model import Model
from phicore.plugins import Plugins

TELL_EVERY_S = 0.1  # reports of progress must not slow down the measurement


@dataclass(frozen=True)
class Row:
    """A measurement: reading `n_prompt` tokens or, if that is 0, generating tokens.

    It then generates `n_gen` tokens after a prompt of `depth` tokens. A depth of 0 means a prompt
    of one token, since generating needs a prompt. `sequences` of these are computed together; the
    time counts from when all of them have begun.
    """

    n_prompt: int = 0
    n_gen: int = 0
    depth: int = 0
    sequences: int = 1

    @property
    def name(self) -> str:
        """Return the name that llama-bench would give the row."""
        if self.n_prompt:
            return f"pp{self.n_prompt}"
        many = f" x {self.sequences}" if self.sequences > 1 else ""
        return f"tg{self.n_gen}{many} @ d{self.depth}" if self.depth else f"tg{self.n_gen}{many}"

    @property
    def prompt_tokens(self) -> int:
        return self.n_prompt or max(self.depth, 1)

    @property
    def new_tokens(self) -> int:
        """Return `max_tokens` for `generate`: `n_gen`, and one token that comes with the prompt."""
        return 1 + self.n_gen + 2 * (self.sequences - 1)  # the first go on while others begin

    @property
    def tokens(self) -> int:
        """Return the number of tokens that a run reads and generates.

        The first generated token does not count, since reading the prompt gives it.
        """
        return self.sequences * (self.prompt_tokens + self.n_gen)

    def run(self, model: Model, tell: Callable[[int], None] = lambda done: None) -> Timings:
        """Run the measurement once, with a random prompt that is the same in every run.

        Args:
            tell: Called after each new token with the number of tokens that are done.
        """
        rng = np.random.default_rng(0)
        options: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1, "seed": 0}
        requests = [
            model.request(
                rng.integers(model.vocab_size, size=self.prompt_tokens),
                max_tokens=self.new_tokens,
                ignore_eos=True,
                **options,
            )
            for _ in range(self.sequences)
        ]
        if self.sequences > 1:
            return _together(model.engine, requests, tell)
        generation = model.generate(requests[0])
        with swallowed_interrupts() as swallowed:
            for new, _ in enumerate(generation):
                if swallowed:
                    raise KeyboardInterrupt
                tell(self.prompt_tokens + new)
        return generation.timings


def _together(engine: Engine, requests: Sequence[Request], tell: Callable[[int], None]) -> Timings:
    """Run requests together; return the times of all answers as if they were one.

    The time counts from when all have a token until one of them ends.
    """
    sequences = [engine.add(request) for request in requests]

    def tokens() -> int:
        return sum(len(sequence.answer) for sequence in sequences)

    def run_while(goes_on: Callable[[], bool]) -> None:
        while goes_on():
            engine.step()
            tell(tokens() + sum(len(request.prompt_ids) for request in requests))
            if swallowed:
                raise KeyboardInterrupt

    try:
        with swallowed_interrupts() as swallowed:
            run_while(lambda: not all(sequence.answer for sequence in sequences))
            started, begun = time.perf_counter(), tokens()
            compiled_s = sequences[0].timings.compile_s
            run_while(lambda: not any(sequence.finish_reason for sequence in sequences))
    finally:
        for sequence in sequences:
            engine.abort(sequence)
    compile_s = sequences[0].timings.compile_s
    took_s = time.perf_counter() - started - (compile_s - compiled_s)
    return Timings(generated_tokens=1 + tokens() - begun, decode_s=took_s, compile_s=compile_s)


@dataclass(frozen=True)
class Moment:
    """The progress of a benchmark.

    Attributes:
        name: The name of the row that is being measured.
        run, runs: The number of the row's run, and the number of its runs. Run 0 is the warm-up.
        done, tokens: The number of tokens of this run that are done, and the number of all.
        left_s: The estimated remaining time of the benchmark, based on the last run of each row.
            None until each row has run once.
    """

    name: str
    run: int
    runs: int
    done: int
    tokens: int
    left_s: float | None


class _Clock:
    """Measures the time of runs, and reports the progress."""

    def __init__(
        self, rows: Sequence[Row], repetitions: int, progress: Callable[[Moment], None]
    ) -> None:
        self._repetitions = repetitions
        self._progress = progress
        self._left = dict.fromkeys(rows, 1 + repetitions)  # runs left, with the current one
        self._took_s: dict[Row, float] = {}  # the time of the last run

    def run(self, row: Row, model: Model, before: Callable[[], None] = lambda: None) -> Timings:
        """Call `before`, then run a row."""
        started = last = time.perf_counter()

        def tell(done: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if done > 0 and now - last < TELL_EVERY_S:
                return
            last = now
            number = 1 + self._repetitions - self._left[row]
            left_s = None
            if len(self._took_s) == len(self._left):
                all_s = sum(self._took_s[r] * count for r, count in self._left.items())
                left_s = max(all_s - (now - started), 0.0)
            self._progress(Moment(row.name, number, self._repetitions, done, row.tokens, left_s))

        tell(0)
        before()
        timings = row.run(model, tell)
        self._took_s[row] = time.perf_counter() - started - timings.compile_s
        self._left[row] -= 1
        return timings


def plan(
    n_prompt: Sequence[str],
    n_gen: Sequence[str],
    depth: Sequence[str],
    sequences: Sequence[str] = ("1",),
) -> list[Row]:
    """Make the rows from the options, each of which is a list of texts such as "128,512".

    Raises:
        ArgumentError: If an option has anything but numbers, or if there is nothing to measure.
    """
    prompts = _numbers("n_prompt", n_prompt)
    answers, depths = _numbers("n_gen", n_gen), _numbers("depth", depth)
    rows = [Row(n_prompt=n) for n in prompts if n]
    together = _numbers("sequences", sequences)
    if any(not 1 <= count <= SIZES[-1] for count in together):
        raise ArgumentError(
            parameter="sequences", expected=f"1 to {SIZES[-1]}, such as 1,8", got=sequences[0]
        )
    rows += [
        Row(n_gen=n, depth=d, sequences=count)
        for d in depths
        for n in answers
        for count in together
        if n
    ]
    if not rows:
        raise ArgumentError("nothing to measure: --n-prompt and --n-gen are both 0")
    return rows


def _numbers(parameter: str, texts: Sequence[str]) -> list[int]:
    """Parse the numbers in an option's values, without duplicates."""
    found = [text.strip() for value in texts for text in value.split(",")]
    for text in found:
        if not (text.isascii() and text.isdigit()):
            raise ArgumentError(
                parameter=parameter, expected="0 or more, such as 128,512", got=text
            )
    return list(dict.fromkeys(map(int, found)))


def measure(
    model: Model,
    rows: Sequence[Row],
    repetitions: int,
    progress: Callable[[Moment], None] = lambda moment: None,
) -> dict[str, Any]:
    """Run each row once to warm up, then run all rows in turn, `repetitions` times.

    Args:
        progress: Called before each run, and at most every `TELL_EVERY_S` seconds during a run.
    Returns:
        The figures as plain data. `memory_bandwidth` is None unless the device is the CPU.
        `peak_memory_bytes` covers loading and the warm-up. It does not cover the array that the
        bandwidth is measured with.
    Raises:
        ArgumentError: If a row needs more tokens than the model's context.
    """
    for row in rows:
        if (needed := row.prompt_tokens + row.new_tokens) > model.context:
            raise ArgumentError(
                f"{row.name}: needs a context of {needed} tokens, the model has {model.context}"
            )
    info = Plugins().backends()[model.backend]
    runs, peak_memory_bytes, samples = _run_in_turn(
        model, rows, repetitions, progress, with_bandwidth=model.device == "cpu"
    )
    memory = _bandwidth_figures(samples) if samples else None
    with open_gguf(model.path) as file:
        tensors, size_bytes = list(file.tensors.values()), file.size_bytes
        weights, step_bytes = sum(t.n_elements for t in tensors), bytes_per_step(tensors)
    return {
        "model": model.reference,
        "file": model.path.name,
        "size_bytes": size_bytes,
        "weights": weights,
        "bytes_per_step": step_bytes,
        "backend": info.name,
        "backend_version": f"{info.distribution} {info.version}",
        "device": model.device,
        "cpu": cpu_name(),
        "cpus": cpu_count(),
        "python": platform.python_version(),
        "load_s": model.load_s,
        "compile_s": sum(t.compile_s for timings in runs for t in timings),
        "peak_memory_bytes": peak_memory_bytes,
        "memory_bandwidth": memory,
        "repetitions": repetitions,
        "rows": [
            _row_figures(row, timings[1:], step_bytes, memory)
            for row, timings in zip(rows, runs, strict=True)
        ],
    }


def _run_in_turn(
    model: Model,
    rows: Sequence[Row],
    repetitions: int,
    progress: Callable[[Moment], None],
    *,
    with_bandwidth: bool,
) -> tuple[list[list[Timings]], int | None, list[float]]:
    """Run all rows.

    Returns:
        The timings of each row, the warm-up first; the peak memory after the warm-up; and samples
        of the memory bandwidth in bytes per second.
    """
    clock = _Clock(rows, repetitions, progress)
    runs = [[clock.run(row, model)] for row in rows]
    peak_memory_bytes = model.peak_memory_bytes()
    with MemoryBandwidth() if with_bandwidth else nullcontext() as bandwidth:
        for _ in range(repetitions):
            for row, timings in zip(rows, runs, strict=True):
                sample = (lambda: None) if bandwidth is None else bandwidth.sample
                timings.append(clock.run(row, model, sample))
    return runs, peak_memory_bytes, bandwidth.samples if bandwidth is not None else []


def bytes_per_step(tensors: Iterable[GGUFTensor]) -> int:
    """Return how many bytes of a file's weights are read to generate a token.

    All matrices count, but only two experts of a layer. The embedding counts only if it is also the
    output matrix, since otherwise one row of it is read.
    """
    matrices = {}
    for t in tensors:
        if len(t.shape) == 2:
            matrices[t.name] = t.size_bytes
        elif len(t.shape) == 3:  # it holds a matrix for each expert
            matrices[t.name] = t.size_bytes * NUM_EXPERTS_PER_TOK // t.shape[0]
    if "output.weight" in matrices:
        matrices.pop("token_embd.weight", None)
    return sum(matrices.values())


def _bandwidth_figures(samples: Sequence[float]) -> dict[str, Any]:
    return {
        "median_gb_per_s": statistics.median(samples) / 1e9,
        "best_gb_per_s": max(samples) / 1e9,
        "threads": cpu_count(),
    }


def _row_figures(
    row: Row, runs: Sequence[Timings], step_bytes: int, memory: dict[str, Any] | None
) -> dict[str, Any]:
    is_prompt = row.n_prompt > 0
    speeds = [t.prompt_tokens_per_s if is_prompt else t.decode_tokens_per_s for t in runs]
    median = statistics.median(speeds)
    gb_per_s = None if is_prompt else median / row.sequences * step_bytes / 1e9
    share = gb_per_s / memory["median_gb_per_s"] if gb_per_s is not None and memory else None
    return {
        "name": row.name,
        "n_prompt": row.n_prompt,
        "n_gen": row.n_gen,
        "depth": row.depth,
        "sequences": row.sequences,
        "tokens_per_s": median,
        "min_tokens_per_s": min(speeds),
        "max_tokens_per_s": max(speeds),
        "samples_tokens_per_s": speeds,
        "weights_gb_per_s": gb_per_s,
        "share_of_bandwidth": share,
    }
