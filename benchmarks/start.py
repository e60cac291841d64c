"""Measure what a start of `phicore generate` consists of, from the process to its first text.

A run is a process that answers one prompt, greedily, with the phases of its start measured. `cold`
runs have empty caches: kernels and steps are compiled, and weights are packed. `warm` runs find
what a run before them has kept. Several installations take turns, so that one can be compared with
another; the medians are printed as a Markdown table.

    uv run benchmarks/start.py --runs 5
    uv run benchmarks/start.py -m phi-3-mini --python ../other/.venv/bin/python
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT = "Write a haiku about ice hockey, then explain it to a child."
PHASES = {
    "python": "Python starts",
    "arguments": "the command's modules and arguments",
    "library": "the tensor library",
    "header": "the file's header",
    "tokenizer": "the tokenizer",
    "weights": "the weights, as far as they are waited for",
    "request": "the prompt's tokens",
    "programs": "steps: compiled or loaded, and waited for",
    "rest": "all else until the first text",
    "first": "**process start to first text**",
    "end": "process start to its end",
}


class Clock:
    """Measures phases in seconds.

    Args:
        started_s: When the process was asked for, by `time.time`.
    """

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self.found = dict.fromkeys(PHASES, 0.0)

    def now(self) -> float:
        """Return the time since the process was asked for."""
        return time.time() - self._started_s

    def measure(self, owner: Any, name: str, phase: str) -> None:
        """Replace a function by one that adds its time to a phase until the first text."""
        function: Callable[..., Any] = getattr(owner, name)

        def measured(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if not self.found["first"]:
                    self.found[phase] += time.perf_counter() - started

        setattr(owner, name, measured)


class Output:
    """Standard output that notes when the first text is written."""

    def __init__(self, file: Any, clock: Clock) -> None:
        self._file = file
        self._clock = clock

    def write(self, text: str) -> Any:
        if text and not self._clock.found["first"]:
            self._clock.found["first"] = self._clock.now()
        return self._file.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def work(started_s: float, result: Path, arguments: list[str]) -> None:
    """Run `phicore` with these arguments in this process, and write the phases to a file."""
    clock = Clock(started_s)
    clock.found["python"] = clock.now()
    import phicore.__main__ as program
    from phicore import loading, model
    from phicore.engine import compiled, engine
    from phicore.plugins import manager

    load = loading.load

    def loads(*args: Any, **kwargs: Any) -> Any:  # the command has read its arguments
        clock.found["arguments"] = clock.now() - clock.found["python"]
        return load(*args, **kwargs)

    loading.load = loads
    clock.measure(loading, "choose_backend", "library")
    clock.measure(manager.BackendInfo, "create", "library")
    clock.measure(model, "open_gguf", "header")
    clock.measure(model, "tokenizer_of", "tokenizer")
    if hasattr(engine, "Weights"):  # a thread packs them
        clock.measure(engine.Weights, "get", "weights")
    else:
        clock.measure(engine, "load_params", "weights")
    clock.measure(model.Model, "request", "request")
    clock.measure(compiled.Compiled, "_call", "programs")
    sys.argv, sys.stdout = ["phicore", *arguments], Output(sys.stdout, clock)
    try:
        program.main()
    except SystemExit as exit:
        if exit.code:
            raise
    found = clock.found
    parts = [name for name in PHASES if name not in ("rest", "first", "end")]
    found["rest"] = found["first"] - sum(found[name] for name in parts)
    result.write_text(json.dumps(found))


def run(python: str, arguments: list[str], caches: Path) -> dict[str, float]:
    """Run `work` in a process of its own with its caches in this folder."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "phases.json"
        command = [python, __file__, "--worker", str(time.time()), str(result), *arguments]
        environment = os.environ | {"XDG_CACHE_HOME": str(caches)}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        ended = time.time()
        return {**json.loads(result.read_text()), "end": ended - float(command[3])}


def report(runs: dict[str, list[dict[str, float]]]) -> None:
    """Print the medians, one column for each kind of run."""
    print(f"| seconds | {' | '.join(runs)} |")
    print(f"| --- |{' ---: |' * len(runs)}")
    for name, title in PHASES.items():
        medians = [statistics.median(each[name] for each in found) for found in runs.values()]
        print(f"| {title} | {' | '.join(f'{median:.2f}' for median in medians)} |")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", "-m", default="smollm2", help="a reference, as for `generate`")
    parser.add_argument("--backend", "-b", default="jax")
    parser.add_argument("--runs", type=int, default=5, help="number of warm runs")
    parser.add_argument("--cold-runs", type=int, default=1)
    parser.add_argument("--tokens", "-n", type=int, default=4)
    parser.add_argument(
        "--python", action="append", help="another installation's Python, to compare with"
    )
    args = parser.parse_args()
    arguments = ["generate", "-m", args.model, "-b", args.backend, "-t", "0"]
    arguments += ["-n", str(args.tokens), "--", PROMPT]
    pythons = [sys.executable, *(args.python or [])]
    names = ["this", *(f"other {n}" for n in range(1, len(pythons)))] if args.python else [""]
    kinds = [f"{kind} {name}".strip() for kind in ("cold", "warm") for name in names]
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as home:
        warm = {name: Path(home, f"warm-{number}") for number, name in enumerate(names)}
        for number in range(args.cold_runs):
            for name, python in zip(names, pythons, strict=True):
                cold = Path(home, f"cold-{name}-{number}")
                runs[f"cold {name}".strip()].append(run(python, arguments, cold))
        for name, python in zip(names, pythons, strict=True):
            run(python, arguments, warm[name])
        for _ in range(args.runs):  # in turn, so that a slow minute affects all
            for name, python in zip(names, pythons, strict=True):
                runs[f"warm {name}".strip()].append(run(python, arguments, warm[name]))
    report({kind: found for kind, found in runs.items() if found})


if __name__ == "__main__":
    main()
