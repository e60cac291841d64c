"""Load time, time to first token and tokens/s of a model, as a user has them.

Each run is a fresh process of `phicore generate --json`; backends take turns, and the median of the
runs is printed as a Markdown table. The first run of a backend, in which XLA may still have to
compile for this machine, is shown by itself and is not in the median.

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

PROMPT = "Write a haiku about ice hockey, then explain it to a child in a hundred words."


def run(model: str, backend: str, tokens: int) -> dict[str, float]:
    """One process: wall time, and what phicore says of itself."""
    command = [sys.executable, "-m", "phicore", "generate", "--model", model, "--backend", backend]
    command += ["--max-tokens", str(tokens), "--temperature", "0", "--no-stats", "--json", PROMPT]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall_s = time.perf_counter() - started
    return {"wall_s": wall_s, **json.loads(done.stdout)["stats"]}


COLUMNS = {
    "load, s": ("load_s", "{:.2f}"),
    "compile, s": ("compile_s", "{:.2f}"),
    "first token after loading, s": ("first_token_s", "{:.2f}"),
    "prompt, tokens/s": ("prompt_tokens_per_s", "{:.0f}"),
    "decode, tokens/s": ("decode_tokens_per_s", "{:.1f}"),
    "whole process, s": ("wall_s", "{:.1f}"),
    "peak memory, MB": ("peak_memory_bytes", "{:.0f}"),
}


def row(name: str, stats: dict[str, float]) -> str:
    cells = []
    for key, form in COLUMNS.values():
        value = stats[key] / 1e6 if key.endswith("bytes") else stats[key]
        cells.append(form.format(value))
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()

    backends = [info.name for info in phicore.backends()]
    first = {name: run(args.model, name, args.tokens) for name in backends}
    runs = {name: [] for name in backends}
    for _ in range(args.runs):  # in turn, so that a slow minute of the machine hits all alike
        for name in backends:
            runs[name].append(run(args.model, name, args.tokens))

    print(f"{args.model}, {args.tokens} tokens, {os.cpu_count()} CPUs ({platform.machine()}), ")
    print(f"Python {platform.python_version()}, median of {args.runs} runs\n")
    print(f"| backend | {' | '.join(COLUMNS)} |")
    print(f"| --- |{' --- |' * len(COLUMNS)}")
    for name in backends:
        median = {k: statistics.median(r[k] for r in runs[name]) for k in runs[name][0]}
        print(row(name, median))
        print(row(f"{name}, first run", first[name]))


if __name__ == "__main__":
    main()
