"""Measure a model's load time, time to first token and tokens/s, as a user sees them.

Each run is a fresh process that loads the model and answers one prompt twice: the first answer
includes start-up work such as compilation, the second shows the speed. Backends take turns, and the
medians are printed as a Markdown table. The very first run of each backend, in which XLA may
compile, has its own row.

    uv run benchmarks/demo_model.py --runs 5
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import phicore
from phicore.lab.machine import cpu_name

PROMPT = "Write a haiku about ice hockey, then explain it to a child in a hundred words."
COLUMNS = {
    "load, s": ("load_s", "{:.2f}"),
    "first token after loading, s": ("first_token_s", "{:.2f}"),
    "process start to first token, s": ("start_s", "{:.1f}"),
    "prompt, tokens/s": ("prompt_tokens_per_s", "{:.0f}"),
    "decode, tokens/s": ("decode_tokens_per_s", "{:.1f}"),
    "peak memory, MB": ("peak_mb", "{:.0f}"),
}


def measure(model_ref: str, backend: str, tokens: int, started: float) -> dict[str, float]:
    """Load the model, answer the prompt twice and return the figures of `COLUMNS`.

    Args:
        started: When the parent asked for this process, in seconds since 1970.
    """
    model = phicore.load(model_ref, backend, prefix_cache_bytes=0)
    options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    first = model.generate(PROMPT, **options)
    next(first)
    start_s = time.time() - started
    list(first)
    second = model.generate(PROMPT, **options)
    list(second)
    return {
        "load_s": model.load_s,
        "first_token_s": first.timings.first_token_s,
        "start_s": start_s,
        "prompt_tokens_per_s": second.timings.prompt_tokens_per_s,
        "decode_tokens_per_s": second.timings.decode_tokens_per_s,
        "peak_mb": (model.peak_memory_bytes() or 0) / 1e6,
    }


def run(model: str, backend: str, tokens: int) -> dict[str, float]:
    """Run `measure` in a fresh process and return its result."""
    command = [sys.executable, __file__, "--worker", backend, str(time.time())]
    command += ["--model", model, "--tokens", str(tokens)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        backend, started = args.worker
        print(json.dumps(measure(args.model, backend, args.tokens, float(started))))
        return

    backends = [info.name for info in phicore.backends()]
    first = {name: run(args.model, name, args.tokens) for name in backends}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in backends}
    for _ in range(args.runs):  # in turn, so that a slow minute of the machine affects all backends
        for name in backends:
            runs[name].append(run(args.model, name, args.tokens))

    print(f"{args.model}, {args.tokens} tokens; {os.cpu_count()} CPUs, {cpu_name()};")
    print(f"Python {platform.python_version()}; medians of {args.runs} runs\n")
    print(f"| backend | {' | '.join(COLUMNS)} |")
    print(f"| --- |{' --- |' * len(COLUMNS)}")
    for name in backends:
        median = {k: statistics.median(r[k] for r in runs[name]) for k in runs[name][0]}
        for title, row in ((name, median), (f"{name}, very first run", first[name])):
            print(f"| {title} | {' | '.join(f.format(row[k]) for k, f in COLUMNS.values())} |")


if __name__ == "__main__":
    main()
