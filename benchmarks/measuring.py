"""The measurements of `peers.py`: engines in turn, in rounds, and rows of what was found."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import reference
from contenders import Contender, Found, Process
from engines.worker import EngineEnded
from figures import BASE, Result, Row

from phicore.backend.host import cpu_count
from phicore.gguf.reader import open_gguf
from phicore.lab.bench import bytes_per_step
from phicore.lab.machine import MemoryBandwidth, cpu_name
from phicore.lab.parity import PROMPTS

Command = tuple[Any, ...]

CHUNK = 512  # tokens of the prompts whose time a long prompt's is compared with
START_PROMPT = 16
ERROR_PROMPT = 100
PAUSE_S = 0.1  # lets the threads of the last engine go to sleep
ARITHMETIC = "llama.cpp's arithmetic"


@dataclass(frozen=True)
class Plan:
    """What is measured, on which file; the names are those of the options of `peers.py`."""

    path: Path
    sections: Sequence[str]
    prompts: Sequence[int]
    depths: Sequence[int]
    sequences: Sequence[int]
    steps: int
    rounds: int
    starts: int
    patience: float
    threads: int | None = None
    has_texts: bool = False

    def has(self, section: str) -> bool:
        return section in self.sections

    @property
    def context(self) -> int:
        """The largest number of tokens of a text."""
        lengths = [START_PROMPT + 1, ERROR_PROMPT, 1 + self.steps + 2]
        lengths += self.prompts if self.has("prompts") else []
        if self.has("long"):
            lengths += [CHUNK, *(depth + self.steps + 2 for depth in self.depths)]
        return max(lengths)

    def commands(self) -> list[tuple[Command, bool]]:
        """Return the requests of a round, and whether each measures a prompt alone."""
        found: list[tuple[Command, bool]] = []
        if self.has("decode") or self.has("many"):
            found.append((("decode", self.steps, 1), False))
        if self.has("products"):
            found.append((("products",), False))
        if self.has("many"):
            found += [(("decode_many", self.steps, count), False) for count in self.sequences]
        lengths = list(self.prompts) if self.has("prompts") else []
        if self.has("long") and CHUNK not in lengths:
            lengths.append(CHUNK)
        found += [(("prefill", count), True) for count in lengths]
        if self.has("long"):
            found += [(("after", self.steps, depth), True) for depth in self.depths]
        return found


@dataclass
class Measurement:
    """Measures a plan with the engines that were found.

    Attributes:
        say: Called with lines on how far it is.
    """

    plan: Plan
    found: Found
    say: Callable[[str], None] = lambda line: None
    _bandwidths: list[float] = field(default_factory=list)
    _about: dict[str, str] = field(default_factory=dict)
    _live: dict[tuple[str, int], int] = field(default_factory=dict)
    _out: dict[str, str] = field(default_factory=dict)

    def run(self) -> Result:
        """Measure all sections.

        An engine whose process ends is left out from then on, and the result says so.

        Raises:
            PhicoreError: If the file cannot be read.
        """
        plan = self.plan
        with open_gguf(plan.path) as file:
            step_bytes, size_bytes = bytes_per_step(file.tensors.values()), file.size_bytes
        started, others_s = time.perf_counter(), others_cpu_s()
        rows: list[Row] = []
        values: dict[Command, dict[str, list[Any]]] = {}
        if commands := plan.commands():
            values = self._rounds(commands)
        else:
            with MemoryBandwidth() as bandwidth:
                bandwidth.sample()
                bandwidth.sample()
            self._bandwidths = bandwidth.samples[1:]
        rows = self._rows(values, step_bytes)
        rows += self._starts(size_bytes) if plan.has("starts") else []
        rows += self._errors() if plan.has("errors") else []
        elapsed_s, others_s = time.perf_counter() - started, others_cpu_s() - others_s
        names = [c.name for c in self.found.contenders if c.name not in self._out]
        names += [ARITHMETIC] if ARITHMETIC in self._about else []
        left_out = [f"{name}: {reason}" for name, reason in self._out.items()]
        processor, instructions = machine(), self._instructions()
        head = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "commit": commit(),
            "processor": f"{processor}, {instructions}" if instructions else processor,
            "cpus": cpu_count(),
            "threads": plan.threads or cpu_count(),
            "file": plan.path.name,
            "size_bytes": size_bytes,
            "rounds": plan.rounds,
            "bandwidth_bytes_per_s": self._bandwidths,
            "others_share": others_s / elapsed_s / (os.cpu_count() or 1),
            "engines": {name: self._about.get(name, "") for name in names},
            "left_out": [*self.found.left_out, *left_out],
        }
        return Result(head, [row for row in rows if row.values])

    # ---- rounds -----------------------------------------------------------------------------

    def _rounds(self, commands: list[tuple[Command, bool]]) -> dict[Command, dict[str, list[Any]]]:
        """Return the answers of each engine to each request, one for each round that counts."""
        plan = self.plan
        values: dict[Command, dict[str, list[Any]]] = {command: {} for command, _ in commands}
        is_slow: set[tuple[Command, str]] = set()
        with ExitStack() as stack:
            workers = {
                c.name: stack.enter_context(c.start(plan.context)) for c in self.found.contenders
            }
            for name, worker in workers.items():
                self._about[name] = self._ask(name, worker, "about") or ""
            bandwidth = stack.enter_context(MemoryBandwidth())
            bandwidth.sample()
            for number in range(1 + plan.rounds):
                self.say(f"round {number} of {plan.rounds}")
                for command, is_prompt in commands:
                    bandwidth.sample()
                    for contender in self.found.contenders[:: -1 if number % 2 else 1]:
                        name = contender.name
                        key = (command, name)
                        if key in is_slow or (contender.is_prompts_alone and not is_prompt):
                            continue
                        time.sleep(PAUSE_S)
                        started = time.perf_counter()
                        answer = self._ask(name, workers[name], *command)
                        took_s = time.perf_counter() - started
                        if number == 0 and took_s > plan.patience:
                            is_slow.add(key)
                        if answer is not None and (number or key in is_slow):
                            values[command].setdefault(name, []).append(answer)
            self._bandwidths = bandwidth.samples[1 + len(commands) :]  # those of rounds that count
            if plan.has("long"):
                for depth in plan.depths:
                    for name, worker in workers.items():
                        live = self._ask(name, worker, "live_bytes", depth)
                        if live is not None:
                            self._live[name, depth] = live
        return values

    def _ask(self, name: str, worker: Process, *command: Any) -> Any:
        if name in self._out:
            return None
        try:
            return worker.ask(*command)
        except EngineEnded as error:
            self._out[name] = f"{command[0]}: {error}"
            self.say(f"{name} is left out: {self._out[name]}")
            return None

    def _rows(self, values: dict[Command, dict[str, list[Any]]], step_bytes: int) -> list[Row]:
        plan, rows = self.plan, []

        def speeds(command: Command, tokens: int = 1) -> dict[str, list[float]]:
            return {n: [tokens / s for s in found] for n, found in values[command].items()}

        bandwidth = float(np.median(self._bandwidths)) if self._bandwidths else 0.0
        one = ("decode", plan.steps, 1)
        if plan.has("decode"):
            rows.append(Row("decode", "tokens/s", speeds(one)))
            of = {n: [x * step_bytes / bandwidth for x in v] for n, v in speeds(one).items()}
            rows.append(Row("decode, of the memory bandwidth", "share", of))
        if plan.has("products"):
            rows.append(Row("MLX's products of a token alone", "tokens/s", speeds(("products",))))
        if plan.has("many"):
            for count in plan.sequences:
                found = speeds(("decode_many", plan.steps, count))
                rows.append(Row(f"decode of {count} at once", "tokens/s", found))
                over = {
                    n: [x / y for x, y in zip(v, speeds(one)[n], strict=False)]
                    for n, v in found.items()
                    if n in speeds(one)
                }
                rows.append(Row(f"{count} at once over one alone", "x", over))
        if plan.has("prompts"):
            for count in plan.prompts:
                found = speeds(("prefill", count), count)
                rows.append(Row(f"prompt of {count}", "tokens/s", found))
        if plan.has("long"):
            for depth in plan.depths:
                rows += self._long(depth, values, step_bytes, bandwidth)
        return rows

    def _long(
        self,
        depth: int,
        values: dict[Command, dict[str, list[Any]]],
        step_bytes: int,
        bandwidth: float,
    ) -> list[Row]:
        found = values["after", self.plan.steps, depth]
        short = values["prefill", CHUNK]
        prompts = {n: [depth / prompt for prompt, _ in v] for n, v in found.items()}
        attention = {
            n: [
                max(prompt - depth / CHUNK * chunk, 0.0)
                for (prompt, _), chunk in zip(v, short[n], strict=False)
            ]
            for n, v in found.items()
            if n in short
        }
        alone = {c.name for c in self.found.contenders if c.is_prompts_alone}
        steps = {n: [step for _, step in v] for n, v in found.items() if n not in alone}
        least = {
            n: [step * bandwidth / (step_bytes + self._live[n, depth]) for step in v]
            for n, v in steps.items()
            if (n, depth) in self._live
        }
        speeds = {n: [1 / step for step in v] for n, v in steps.items()}
        return [
            Row(f"prompt of {depth}", "tokens/s", prompts),
            Row(f"prompt of {depth}: what exceeds prompts of {CHUNK}", "s", attention),
            Row(f"decode after {depth}", "tokens/s", speeds),
            Row(f"decode after {depth}, over the least time", "least", least),
        ]

    # ---- processes of their own -------------------------------------------------------------

    def _starts(self, size_bytes: int) -> list[Row]:
        """Measure the time to the first token and the peak memory of fresh processes."""
        contenders = [c for c in self.found.contenders if not c.is_prompts_alone]
        seconds: dict[str, list[float]] = {}
        peaks: dict[str, list[float]] = {}
        for number in range(1 + self.plan.starts):
            self.say(f"start {number} of {self.plan.starts}")
            for contender in contenders:
                name = contender.name
                if name in self._out:
                    continue
                time.sleep(PAUSE_S)
                started = time.perf_counter()
                with contender.start(START_PROMPT + 1) as worker:
                    self._ask(name, worker, "first_token", START_PROMPT)
                    took_s = time.perf_counter() - started
                    peak = self._ask(name, worker, "peak_bytes")
                    if name not in self._about:
                        self._about[name] = self._ask(name, worker, "about") or ""
                if number and peak:
                    seconds.setdefault(name, []).append(took_s)
                    peaks.setdefault(name, []).append(peak / size_bytes)
        return [
            Row("process start to first token", "s", seconds),
            Row("its peak memory over the file", "file", {n: [max(p)] for n, p in peaks.items()}),
        ]

    def _errors(self) -> list[Row]:
        """Compute the relative errors of logits, against float32."""
        texts = {"random tokens": [self._random_tokens()]}
        if self.plan.has_texts:
            texts["texts"] = self._texts()
        rows = []
        for name, prompts in texts.items():
            self.say(f"errors on {name}")
            expected = self._expected(prompts, reference.Streamed)
            found: dict[str, np.ndarray] = {}
            for contender in self.found.contenders:
                logits = self._logits(contender, prompts)
                if logits is not None:
                    found[contender.name] = logits
            if BASE not in found:
                found[ARITHMETIC] = self._expected(prompts, reference.LlamaArithmetic)
                self._about[ARITHMETIC] = "activations of 8 bits, on NumPy; it has errors alone"
            errors = {n: [reference.error(logits, expected)] for n, logits in found.items()}
            middle = {n: [reference.median_error(v, expected)] for n, v in found.items()}
            rows.append(Row(f"error of the logits, {name}", "error", errors))
            rows.append(Row(f"error at the median position, {name}", "error", middle))
        return rows

    def _random_tokens(self) -> list[int]:
        with open_gguf(self.plan.path) as file:
            size = file.tensors["token_embd.weight"].shape[0]
        return np.random.default_rng(0).integers(size, size=ERROR_PROMPT).tolist()

    def _texts(self) -> list[list[int]]:
        with reference.opened(self.plan.path, reference.Streamed()) as model:
            return [model.encode(text, raw=True) for text in PROMPTS]

    def _expected(self, prompts: list[list[int]], make: Callable[[], Any]) -> np.ndarray:
        with reference.opened(self.plan.path, make()) as model:
            return np.concatenate([model.logits(ids) for ids in prompts])

    def _logits(self, contender: Contender, prompts: list[list[int]]) -> np.ndarray | None:
        """Return the logits of prompts, one after the other, (T, V) float32."""
        name, found = contender.name, []
        with (
            contender.start(max(map(len, prompts))) as worker,
            tempfile.TemporaryDirectory() as folder,
        ):
            path = Path(folder) / "logits.npy"
            if name not in self._about:
                self._about[name] = self._ask(name, worker, "about") or ""
            for ids in prompts:
                if not self._ask(name, worker, "save_logits", ids, str(path)):
                    return None
                found.append(np.load(path))
        return np.concatenate(found)

    def _instructions(self) -> str:
        """Return the name of the instructions that phicore's kernels are made for, if any."""
        for line in self._about.values():
            _, found, rest = line.partition("CPU kernels: ")
            if found:
                return rest.partition(",")[0]
        return ""


def machine() -> str:
    """Return the name of the processor and, on Linux on x86, the numbers of its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    pairs = [line.partition(":")[::2] for line in lines]
    found = {name.strip(): value.strip() for name, value in reversed(pairs)}
    if "cpu family" not in found:
        return cpu_name()
    return f"{cpu_name()} (family {found['cpu family']}, model {found['model']})"


def commit() -> str:
    """Return the commit that is measured, with a + if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + "+" * bool(changed)


def others_cpu_s() -> float:
    """Return the CPU seconds spent on processes other than this one and its ended children."""
    times = Path("/proc/stat")
    if not times.is_file() or sys.platform != "linux":
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq = map(int, times.read_text().split()[1:8])
    busy_s = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return busy_s - sum(os.times()[:4])
