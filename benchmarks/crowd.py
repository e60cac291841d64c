"""Measures what users notice when several texts are computed together.

    python benchmarks/crowd.py [--model smollm2] [--backend jax]

It prints, as JSON: the longest silence of a running answer while a prompt of 2000 tokens is read;
the time to the first token of a prompt of 20 tokens that comes meanwhile; the time to the first
token of a conversation's second turn, beside the time that its new tokens take alone; and how the
resident memory grows over many short requests.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import phicore
from phicore.engine import Engine, Request
from phicore.network.sampling import Sampling

GREEDY = Sampling(temperature=0.0)


def request(model: phicore.Model, length: int, count: int, seed: int) -> Request:
    tokens = np.random.default_rng(seed).integers(model.vocab_size, size=length)
    return Request(tokens.tolist(), GREEDY, max_tokens=count, seed=seed)


def silence(model: phicore.Model, long: int = 2000, short: int = 20) -> dict[str, float]:
    """Let an answer run, and add a long prompt and, a little later, a short one."""
    engine = model.engine
    running = engine.add(request(model, 10, model.context - long, 1))
    while len(running.answer) < 20:
        engine.step()
    reader = engine.add(request(model, long, 2, 2))
    started = last = time.perf_counter()
    other, other_started, gaps, first_s = None, 0.0, [], 0.0
    while not reader.answer:
        before = len(running.answer)
        engine.step()
        now = time.perf_counter()
        if len(running.answer) > before:
            gaps.append(now - last)
            last = now
        if other is None and reader.computed > long // 4:
            other, other_started = engine.add(request(model, short, 2, 3)), now
        if other is not None and other.answer and not first_s:
            first_s = now - other_started
    read_s = time.perf_counter() - started
    engine.abort(running)
    run_out(engine)
    return {
        "longest_silence_s": max(gaps),
        "median_silence_s": statistics.median(gaps),
        "first_token_of_a_short_prompt_s": first_s,
        "first_token_of_the_long_prompt_s": read_s,
    }


def second_turn(model: phicore.Model, length: int = 1000, new: int = 30) -> dict[str, float]:
    """Compare the second turn of a conversation with its new tokens alone."""
    engine = model.engine

    def first_token_s(request: Request) -> float:
        sequence, started = engine.add(request), time.perf_counter()
        while not sequence.answer:
            engine.step()
        took_s = time.perf_counter() - started
        engine.abort(sequence)
        run_out(engine)
        return took_s

    turns, alone = [], []
    for seed in range(6):
        engine.prefixes.clear()
        first = request(model, length, 256, seed)
        first_token_s(first)
        added = request(model, new, 2, 100 + seed)
        turn = Request([*first.prompt_ids, *added.prompt_ids], GREEDY, max_tokens=256)
        turns.append(first_token_s(turn))
        alone.append(first_token_s(request(model, new, 256, 200 + seed)))
    turn_s, alone_s = statistics.median(turns[1:]), statistics.median(alone[1:])
    return {"second_turn_s": turn_s, "new_tokens_alone_s": alone_s, "ratio": turn_s / alone_s}


def memory(model: phicore.Model, count: int) -> dict[str, Any]:
    """Run many short requests, and look at the resident memory."""
    found = []
    for index, _ in enumerate(
        model.generate_many(request(model, 1 + i % 12, 1 + i % 4, i) for i in range(count))
    ):
        if index % (count // 5) == 0:
            found.append(resident_mb())
    return {"requests": count, "resident_mb": [*found, resident_mb()]}


def resident_mb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 // 10**6


def run_out(engine: Engine) -> None:
    while not engine.is_idle:
        engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend")
    parser.add_argument("--requests", type=int, default=10_000)
    args = parser.parse_args()
    with phicore.load(args.model, args.backend) as model:
        model.engine.warm_up([GREEDY])
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "silence": lambda: silence(model),
            "second_turn": lambda: second_turn(model),
            "memory": lambda: memory(model, args.requests),
        }
        silence(model)  # compiles larger caches
        model.engine.prefixes.clear()
        found = {"backend": model.backend, **{name: part() for name, part in parts.items()}}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
