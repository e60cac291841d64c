"""Compare the speed of llama.cpp and phicore on one file, with equally many threads.

Each engine is a process that loads the model once (see `engines.py`). Only one process computes at
a time. The engines take turns within a round, and every second round goes in reverse order, so that
a slow minute of the machine affects all engines. A ratio is the median of the rounds' ratios. An
uncounted first round warms up. The program measures

- decoding: the median time of a greedy step after some tokens. A step reads all weights, so its
  share of the memory's bandwidth is given too; the bandwidth is sampled before each turn;
- many sequences: the median time of a greedy step that is shared by several sequences, which have
  begun with one token each (`--sequences 2,4,8`);
- prompts: the time from a prompt's tokens to the first token of the answer. phicore is measured as
  it is by default and, where the processor supports it, with `fast_prefill`, whose products use
  8-bit integers as llama.cpp's do;
- starts: the time from starting a process to the first token after a prompt of 16 tokens. The file
  and phicore's compiled programs are cached, and both engines are started by their Python packages;
- memory: the peak resident memory, mapped pages of the file included;
- fidelity: the relative error of the logits of 100 tokens (norm of the error over norm), against
  float32 on NumPy.

llama.cpp runs with its own defaults: up to 512 tokens at once, keys and values in float16, and
flash attention. (llama-cpp-python's default is no flash attention: `--no-flash-attn`.) Run nothing
else meanwhile: llama.cpp's threads wait for each other after every operation, so a busy machine
slows it several times more than phicore. The share of the CPUs that other processes took is
printed.

    uv run --with llama-cpp-python==0.3.36 benchmarks/vs_llama_cpp.py

This compiles llama.cpp (minutes, once), writes random weights of Phi-3-mini's sizes (2.4 GB;
nothing is downloaded) and runs three processes with them. To use an installed llama.cpp, give
`--llama-python PATH`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engines import PORTABLE_BUILD, Worker

from phicore.backend import BackendOptions
from phicore.backend.host import cpu_count
from phicore.cli.terminal import size, table
from phicore.errors import PhicoreError
from phicore.gguf.reader import open_gguf
from phicore.lab.bench import bytes_per_step
from phicore.lab.machine import MemoryBandwidth, cpu_name
from phicore.lab.synthetic import MODELS, synthetic_model
from phicore.plugins import Plugins, choose_backend
from phicore.sources import resolve

START_PROMPT = 16
FIDELITY_PROMPT = 100
FIDELITY_BYTES = 1e9  # NumPy expands the weights to several times the size of the file
PAUSE_S = 0.1  # lets the threads of the last engine go to sleep
NO_FAST_PREFILL = "phicore has no fast prefill on this processor: its rows are left out"
COLUMNS = ["", "llama.cpp", "phicore", "phicore / llama.cpp"]


@dataclass(frozen=True)
class Row:
    """One measurement of both engines: a value for each round."""

    name: str
    unit: str  # tokens/s, s, MB, share or error
    llama_cpp: list[float]
    phicore: list[float]

    @property
    def ratios(self) -> list[float]:
        return [p / x for p, x in zip(self.phicore, self.llama_cpp, strict=True)]


class Comparison:
    """The measurements that the options ask for, on one file.

    Attributes:
        about: Each engine's description, with its versions.
        bandwidths: Samples of the memory's bandwidth, in bytes per second.
    """

    def __init__(self, args: argparse.Namespace, path: Path) -> None:
        self._args = args
        self._path = str(path)
        self._names = ["llama.cpp", "phicore", *(["fast"] if args.fast_prefill else [])]
        self.about: dict[str, str] = {}
        self.bandwidths: list[float] = []

    def _worker(self, name: str, context: int) -> Worker:
        model, threads = self._path, self._args.threads
        if name != "llama.cpp":  # if `threads` is None, both engines use all CPUs
            options = {"threads": threads, "fast_prefill": name == "fast"}
            return Worker(sys.executable, "phicore", model=model, **options)
        return Worker(
            self._args.llama_python,
            name,
            model_path=model,
            n_ctx=-(-context // 256) * 256,  # phicore sizes its cache itself
            n_threads=threads or cpu_count(),
            n_threads_batch=threads or cpu_count(),
            flash_attn=self._args.flash_attn,
        )

    def starts(self) -> list[Row]:
        """Measure the time to the first token and the peak memory of fresh processes."""
        names = self._names[:2]
        found = [[self._start(name) for name in names] for _ in range(1 + self._args.starts)]
        seconds, peaks = np.array(found[1:]).transpose(2, 1, 0)  # (engines, starts) each
        return [
            Row("process start to first token", "s", *seconds.tolist()),
            Row("its peak memory", "MB", *peaks.max(axis=1, keepdims=True).tolist()),
        ]

    def _start(self, name: str) -> tuple[float, float]:
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        with self._worker(name, START_PROMPT + 1) as worker:
            worker.ask("prefill", START_PROMPT)
            return time.perf_counter() - started, worker.ask("peak_bytes") / 1e6

    def rounds(self, step_bytes: int) -> list[Row]:
        """Measure decoding and prompts, with the engines in turn, and the peak memory of them all.

        Args:
            step_bytes: Bytes of weights that a decode step reads.
        """
        args = self._args
        context = max([*args.prompts, *(depth + 1 + args.steps for depth in args.depths)])
        with ExitStack() as stack:
            workers = {n: stack.enter_context(self._worker(n, context)) for n in self._names}
            self.about = {name: worker.ask("about") for name, worker in workers.items()}
            self._round(workers)
            peaks = [[workers[name].ask("peak_bytes") / 1e6] for name in self._names[:2]]
            bandwidth = stack.enter_context(MemoryBandwidth())
            rounds = []
            for index in range(args.repetitions):
                order = self._names[:: -1 if index % 2 else 1]
                rounds.append(self._round({n: workers[n] for n in order}, bandwidth.sample))
        self.bandwidths = bandwidth.samples
        most = float(np.median(self.bandwidths)) / step_bytes  # steps per second

        def row(title: str, command: tuple[Any, ...], name: str) -> Row:
            speeds = ([found[command, n] for found in rounds] for n in ("llama.cpp", name))
            return Row(title, "tokens/s", *speeds)

        rows = []
        for depth in args.depths:
            title = f"decode after {depth}" if depth > 1 else "decode"
            rows.append(row(title, ("decode", args.steps, depth), "phicore"))
            shares = ([x / most for x in of] for of in (rows[-1].llama_cpp, rows[-1].phicore))
            rows.append(Row(f"{title}, of the bandwidth", "share", *shares))
        for count in args.sequences:
            title = f"decode of {count} at once"
            rows.append(row(title, ("decode_many", args.steps, count), "phicore"))
        for count in args.prompts:
            for name in self._names[1:]:
                title = f"prompt of {count}" + ", fast" * (name == "fast")
                rows.append(row(title, ("prefill", count), name))
        return [*rows, Row("peak memory", "MB", *peaks)]

    def _round(
        self, workers: dict[str, Worker], before: Callable[[], None] = lambda: None
    ) -> dict[tuple[tuple[Any, ...], str], float]:
        """Measure the tokens per second of each command and worker.

        Args:
            before: Called before each command.
        """
        found = {}
        commands = [(("decode", self._args.steps, depth), 1) for depth in self._args.depths]
        commands += [(("decode_many", self._args.steps, n), 1) for n in self._args.sequences]
        commands += [(("prefill", count), count) for count in self._args.prompts]
        for command, tokens in commands:
            before()
            # "fast" decodes too, since an engine that has slept is slow at first
            for name, worker in workers.items():
                time.sleep(PAUSE_S)
                found[command, name] = tokens / worker.ask(*command)
        return found

    def fidelity(self) -> list[Row]:
        """Compute the relative errors of the logits."""
        exact = _logits(Worker(sys.executable, "phicore", model=self._path, backend="numpy"))
        found = {name: _logits(self._worker(name, FIDELITY_PROMPT)) for name in self._names}
        errors = {
            name: [float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))]
            for name, logits in found.items()
        }
        titles = {"phicore": "error of the logits", "fast": "error of the logits, fast"}
        return [Row(titles[n], "error", errors["llama.cpp"], errors[n]) for n in self._names[1:]]


def _logits(worker: Worker) -> np.ndarray:
    with worker, tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        worker.ask("save_logits", FIDELITY_PROMPT, str(path))
        return np.load(path).astype(np.float64)


# ---- for people ---------------------------------------------------------------------------------


def cells(row: Row, size_bytes: int) -> list[str]:
    """Format a row of the table: medians, with the least and the greatest values."""

    def figure(value: float) -> str:
        if row.unit == "MB":
            return f"{value:.0f}, {value * 1e6 / size_bytes:.2f} x file"
        if row.unit in ("share", "error"):
            return f"{value:.0%}" if row.unit == "share" else f"{value:.1e}"
        return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"

    def span(values: list[float], form: Callable[[float], str] = figure) -> str:
        middle, least, most = map(form, (float(np.median(values)), min(values), max(values)))
        return middle if least == most else f"{middle} ({least} to {most})"

    name = row.name if row.unit in ("share", "error") else f"{row.name}, {row.unit}"
    ratio = "{:.1e}" if row.unit == "error" else "{:.2f}"
    return [name, span(row.llama_cpp), span(row.phicore), span(row.ratios, ratio.format)]


def report(found: dict[str, Any], rows: Sequence[Row], *, is_markdown: bool) -> None:
    """Print a head with the file, the versions and the machine, and then the table."""
    low, middle, high = np.percentile(found["bandwidth_bytes_per_s"], [0, 50, 100]) / 1e9
    head = [
        f"{found['file']}, {size(found['size_bytes'])}",
        found["llama_cpp"] + ", no flash attention" * (not found["flash_attn"]),
        found["phicore"],
        f"{found['cpu']}, {found['cpus']} CPUs, --threads {found['threads']}",
        f"bandwidth {middle:.1f} GB/s ({low:.1f} to {high:.1f}), read by all CPUs; "
        f"other processes took {found['others_share']:.0%} of the CPUs",
        f"medians (least to most); rounds: {found['repetitions']}, starts: {found['starts']}",
    ]
    print("; ".join(head) if is_markdown else "\n".join(head), end="\n\n")
    lines = [cells(row, found["size_bytes"]) for row in rows]
    if is_markdown:
        for line in (COLUMNS, ["---"] * len(COLUMNS), *lines):
            print(f"| {' | '.join(line)} |")
    else:
        table(COLUMNS, lines)


def check_llama_cpp(python: str) -> None:
    """Exit with a line on how to install llama_cpp, if this Python has none."""
    try:
        subprocess.run([python, "-c", "import llama_cpp"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        sys.exit(
            f"{python}: no llama_cpp; `uv run --with llama-cpp-python==0.3.36 {sys.argv[0]}` builds"
            " it, and --llama-python names a Python that has it (if the default build crashes, as "
            f"it can on a CPU with AMX: {PORTABLE_BUILD} uv run ...)"
        )


def has_fast_prefill(threads: int | None) -> bool:
    """Return whether phicore can read prompts faster, and less exactly, on this processor.

    Raises:
        PhicoreError: If the JAX backend does not work here, or does not accept a number of threads.
    """
    options = BackendOptions(device="cpu", threads=threads)
    return choose_backend("jax", Plugins()).create(options).capabilities.has_fast_prefill


def others_cpu_s() -> float:
    """Return the CPU seconds spent on processes other than this one and its ended children."""
    times = Path("/proc/stat")
    if not times.is_file():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq = map(int, times.read_text().split()[1:8])
    busy_s = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return busy_s - sum(os.times()[:4])


def positive(text: str) -> int:
    """Parse an option's number, which must be 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text!r}")
    return number


def numbers(text: str) -> list[int]:
    """Parse the numbers of an option such as 128,512, without repetitions."""
    found = list(dict.fromkeys(int(number) for number in text.split(",")))
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, such as 128,512; got {text!r}")
    return found


def prompts(text: str) -> list[int]:
    """Parse the lengths of prompts; 0 stands for no prompt."""
    return [count for count in numbers(text) if count]


def depths(text: str) -> list[int]:
    """Parse the numbers of tokens before decoding; 0 becomes 1, since decoding needs a token."""
    return list(dict.fromkeys(max(depth, 1) for depth in numbers(text)))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option, yes_no = parser.add_argument, argparse.BooleanOptionalAction
    option("--model", help="a GGUF file, or another model reference of phicore")
    option("--synthetic", choices=MODELS, default="phi-3-mini", help="model of random weights")
    option("--llama-python", default=sys.executable, help="a Python that has llama_cpp")
    option("--threads", type=positive, help="number of threads (default: all CPUs)")
    option("--prompts", type=prompts, default=[16, 128, 512], help="lengths of prompts; 0: none")
    option("--depths", type=depths, default=[1], help="tokens before decoding, e.g. 0,1000,2000")
    option("--sequences", type=prompts, default=[], help="how many decode at once, e.g. 2,4,8")
    option("--steps", type=positive, default=32, help="tokens to decode")
    option("--repetitions", type=positive, default=5, help="number of rounds")
    option("--starts", type=int, default=3, help="fresh processes of each engine; 0: none")
    option("--fast-prefill", action=yes_no, default=True, help="also measure with fast prefill")
    option("--flash-attn", action=yes_no, default=True, help="run llama.cpp with flash attention")
    option("--fidelity", action=yes_no, help="errors of the logits (default: for files below 1 GB)")
    option("--markdown", action="store_true")
    option("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = options()
    check_llama_cpp(args.llama_python)
    try:
        is_possible = has_fast_prefill(args.threads)
        if args.fast_prefill and not is_possible:
            args.fast_prefill = False
            print(NO_FAST_PREFILL, file=sys.stderr)
        path = resolve(args.model).path if args.model else synthetic_model(args.synthetic)
        with open_gguf(path) as file:
            step_bytes, size_bytes = bytes_per_step(file.tensors.values()), file.size_bytes
    except PhicoreError as error:
        sys.exit(str(error))
    started, others_s = time.perf_counter(), others_cpu_s()
    comparison = Comparison(args, path)
    starts = comparison.starts() if args.starts else []
    rows = [*comparison.rounds(step_bytes), *starts]
    if args.fidelity or (args.fidelity is None and size_bytes < FIDELITY_BYTES):
        rows += comparison.fidelity()
    elapsed_s, others_s = time.perf_counter() - started, others_cpu_s() - others_s
    found = {
        "file": path.name,
        "size_bytes": size_bytes,
        "llama_cpp": comparison.about["llama.cpp"],
        "flash_attn": args.flash_attn,
        "phicore": comparison.about["phicore"],
        "cpu": cpu_name(),
        "cpus": cpu_count(),
        "threads": args.threads or cpu_count(),
        "fast_prefill": args.fast_prefill,
        "bandwidth_bytes_per_s": comparison.bandwidths,
        "others_share": others_s / elapsed_s / (os.cpu_count() or 1),
        "repetitions": args.repetitions,
        "starts": args.starts,
    }
    if args.json:
        found["rows"] = [asdict(r) | {"ratio": float(np.median(r.ratios))} for r in rows]
        print(json.dumps(found, indent=2))
    else:
        report(found, rows, is_markdown=args.markdown)


if __name__ == "__main__":
    main()
