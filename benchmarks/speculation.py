"""Measures what speculation gains: the same answers with and without it, in turn.

    python benchmarks/speculation.py [--model smollm2] [--draft-model REF] [--runs 5]
        [--llama-python PYTHON]

It prints a row of JSON for each task: the median of the ratios of the speeds with and without, the
smallest and the largest ratio, the same of the processor time that a token takes (which says more
where others use the machine), the speed without in tokens per second, and how many tokens were
drafted and accepted. Each pair of runs decodes the same tokens, which is checked. What is compiled
is compiled before. With `--llama-python`, llama.cpp runs the tasks with and without its own lookup
decoding, too (see `lookup.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import phicore
from phicore.backend.host import cpu_count
from phicore.engine import Timings
from phicore.engine.drafts import Draft, Drafter, Outlook
from phicore.engine.scheduler import Scheduler

TEXT = (
    "The old lighthouse on the northern cape was built in 1874 by a family of stonemasons. For "
    "ninety years its lamp was lit every evening by hand, and the keepers wrote down the "
    "weather, the ships and the visitors in thick books. Since 1964 the lamp has been electric, "
    "and nobody lives in the house any more. In summer a small museum shows the books, the old "
    "lamp and a model of the tower. In winter the road is closed by snow, and only the foxes "
    "know the way."
)

PEOPLE = (
    "Anna Berg, 34, works in Oslo as an engineer. Jonas Lind, 41, works in Malmo as a teacher. "
    "Clara Voss, 29, works in Hamburg as a nurse. Peter Novak, 52, works in Prague as a "
    "carpenter."
)

TASKS = {
    "rewriting": "Repeat the following text word for word, but write 1875 instead of 1874.\n\n"
    f"{TEXT}",
    "quotations": f"Summarize the following text. Quote whole sentences from it.\n\n{TEXT}",
    "json": 'Write the people below as a JSON list of objects with the keys "name", "age", '
    f'"city" and "job".\n\n{PEOPLE}',
    "prose": "Write a story about a girl who finds a map in her grandmother's attic.",
}
SETTINGS = {"greedy": {"temperature": 0.0}, "drawn": {}}


class EachSize(Scheduler):
    """Checks drafts with steps of each size in turn, so that all are compiled."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.checked = 0

    def step_wanted(
        self,
        rows: int,
        most: int,
        drafts: Sequence[Draft | Outlook],
        *,
        token_s: float = 0.0,
        is_drawn: bool = False,
    ) -> int:
        sizes = [size for size in self.step_sizes(rows) if size <= most]
        if not sizes or not any(draft.length for draft in drafts):
            return 1
        self.checked += 1
        return sizes[self.checked % len(sizes)]


def run(
    model: phicore.Model, prompt: str, **options: object
) -> tuple[list[int], float, float, Timings]:
    """Generate an answer; return its tokens, its time and processor time, and its timings."""
    generation = model.generate(prompt, seed=1, **options)
    tokens = [next(generation).token_id]
    started, cpu_started = time.perf_counter(), time.process_time()
    tokens += [piece.token_id for piece in generation]
    took_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    return tokens, took_s, cpu_s, generation.timings


def compare(
    model: phicore.Model, drafter: Drafter | None, task: str, setting: str, runs: int, limit: int
) -> dict[str, object]:
    """Run a task with and without speculation, `runs` times in turn."""
    engine = model.engine
    ratios, cpu_ratios, slow, timings = [], [], [], Timings()
    options = {**SETTINGS[setting], "max_tokens": limit}
    scheduler, engine.scheduler, engine.drafter = engine.scheduler, EachSize(), drafter
    run(model, TASKS[task], **options)
    engine.scheduler = scheduler
    for number in range(-1, runs):  # the first run compiles, too
        found = {}
        for has_drafts in (False, True) if number % 2 else (True, False):
            engine.drafter = drafter if has_drafts else None
            found[has_drafts] = run(model, TASKS[task], **options)
        without, with_drafts = found[False], found[True]
        assert with_drafts[0] == without[0], "speculation has changed the text"
        timings = with_drafts[3]
        if number >= 0:
            slow.append((len(without[0]) - 1) / without[1])
            ratios.append(without[1] / with_drafts[1])
            cpu_ratios.append(without[2] / with_drafts[2])
    return {
        "task": task,
        "setting": setting,
        "tokens": timings.generated_tokens,
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
        "cpu_ratio": round(statistics.median(cpu_ratios), 2),
        "cpu_ratios": [round(min(cpu_ratios), 2), round(max(cpu_ratios), 2)],
        "tokens_per_s_without": round(statistics.median(slow), 1),
        "drafted": timings.drafted_tokens,
        "accepted": timings.accepted_tokens,
    }


def with_llama_cpp(model: phicore.Model, arguments: argparse.Namespace) -> dict[str, object]:
    """Run the tasks, greedy, with llama.cpp; return the ratio of the speeds for each."""
    given = {
        "model": str(model.path),
        "prompts": [model.encode([{"role": "user", "content": TASKS[t]}]) for t in arguments.tasks],
        "count": arguments.max_tokens,
        "ends": sorted(model.tokenizer.end_token_ids),
        "threads": cpu_count(),
        "runs": arguments.runs,
    }
    command = [arguments.llama_python, str(Path(__file__).with_name("lookup.py"))]
    text = json.dumps(given)
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.exit(f"speculation: {arguments.llama_python}: {done.stderr.strip()[-300:]}")
    names = "tokens_per_s_without", "tokens_per_s_with", "tokens"
    found: dict[str, object] = {}
    for task, row in zip(arguments.tasks, json.loads(done.stdout), strict=True):
        found[task] = {"ratio": round(row[1] / row[0], 2), **dict(zip(names, row, strict=True))}
    return {"llama.cpp": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="the model, as `phicore generate` takes it")
    parser.add_argument("--draft-model", help="a smaller model that guesses, too")
    parser.add_argument("--backend", help="the backend")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs of each task")
    parser.add_argument("--max-tokens", type=int, default=160, help="tokens of an answer")
    parser.add_argument(
        "--llama-python", help="a Python with llama-cpp-python, to be measured, too"
    )
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    arguments = parser.parse_args()
    with phicore.load(
        arguments.model,
        arguments.backend,
        ctx=2048,
        prefix_cache_bytes=0,
        speculation=True,
        draft_model=arguments.draft_model,
    ) as model:
        drafter = model.engine.drafter
        print(json.dumps({"model": model.path.name, "backend": model.backend}), flush=True)
        if arguments.llama_python is not None:
            print(json.dumps(with_llama_cpp(model, arguments)), flush=True)
        for task in arguments.tasks:
            for setting in SETTINGS:
                row = compare(model, drafter, task, setting, arguments.runs, arguments.max_tokens)
                row["step_ms"] = {
                    f"{rows}x{size}": round(1000 * seconds, 2)
                    for (rows, size, is_drawn), seconds in sorted(
                        model.engine.scheduler.steps_s.items()
                    )
                    if is_drawn == (setting == "drawn")
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
