"""Checks that texts are the same alone and without speculation, and in a crowd with it.

    python benchmarks/sameness.py [--model smollm2] [--backend jax] [--count 500]

It makes random requests: tasks whose answers repeat their prompt and others, greedy and drawn with
random settings, penalties, logits processors, schemas, regular expressions, a grammar, and stop
strings. Each is answered alone without speculation, and then with it, four at a time, where every
guess is checked, whether or not it pays. It prints a row of JSON with the number of answers, of
those that differ, and of the tokens that were drafted and accepted, and it fails if an answer
differs. The kernels of the `jax` backend for CPUs promise that none does; on other backends
rounding may make one in a great many differ.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from typing import Any

from speculation import TASKS, EachSize

import phicore
from phicore.generation import Answer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "jobs": {"type": "array", "items": {"enum": ["teacher", "nurse"]}, "maxItems": 3},
    },
    "required": ["name", "age", "jobs"],
}
CONSTRAINTS: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"json_schema": True},
    {"regex": r"(Yes|No), because [a-z ]{10,60}\."},
    {"grammar": 'root ::= item+\nitem ::= "- " [a-z ]+ "\\n"'},
]
# One list, since steps are compiled for each combination of processors and each number of rows.
PROCESSORS = ["logit-bias=5:2.5,7:-inf", "frequency-penalty=0.4"]
PROMPTS = [
    *TASKS.values(),
    "List the numbers from 1 to 30, separated by commas.",
    "Write a Python class for a stack with push, pop and peek, and use it.",
    "Write a poem in which every line begins with the same words.",
    "Who is older, Anna (34) or Peter (52)? Answer as JSON.",
]


def options_of(rng: random.Random, longest: int) -> dict[str, Any]:
    """Return random arguments of `Model.request`."""
    options: dict[str, Any] = {
        "prompt": rng.choice(PROMPTS),
        "max_tokens": rng.randint(1, longest),
        "seed": rng.randrange(2**32),
        "temperature": rng.choice([0.0, 0.0, 0.4, 0.8, 1.3]),
        "top_k": rng.choice([0, 40]),
        "top_p": rng.choice([1.0, 0.9]),
        "min_p": rng.choice([0.0, 0.05]),
        "repeat_penalty": rng.choice([1.0, 1.1]),
    }
    if rng.random() < 0.3:
        options.update(rng.choice(CONSTRAINTS))
    if rng.random() < 0.3:
        options["processors"] = PROCESSORS
    if rng.random() < 0.2:
        options["stop"] = rng.choice([["e "], ["\n\n", "the"], [","]])
    return options


def is_same(one: Answer, other: Answer) -> bool:
    """Return whether two answers have the same text of the same tokens.

    A stop string ends the text, and with speculation a few tokens after it may have been computed.
    """
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    same_end = one.text == other.text and one.finish_reason == other.finish_reason
    return same_end and str(one.error) == str(other.error) and all(a == b for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="the model, as `phicore generate` takes it")
    parser.add_argument("--backend", help="the backend")
    parser.add_argument("--count", type=int, default=500, help="the number of requests")
    parser.add_argument("--max-tokens", type=int, default=64, help="the most tokens of an answer")
    parser.add_argument("--seed", type=int, default=1, help="what the requests are made from")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    requests = [options_of(rng, arguments.max_tokens) for _ in range(arguments.count)]
    found, seconds = [], []
    for has_drafts in (False, True):
        with phicore.load(
            arguments.model,
            arguments.backend,
            ctx=2048,
            max_sequences=1,
            speculation=has_drafts,
            prefix_cache_bytes=None if has_drafts else 0,
        ) as model:
            if has_drafts:
                model.engine.scheduler = EachSize(max_sequences=4)
            started = time.perf_counter()
            many = [model.request(**options) for options in requests]
            found.append([*model.generate_many(many, ordered=True)])
            seconds.append(time.perf_counter() - started)
            name, backend = model.path.name, model.backend
    alone, crowd = found
    differing = [i for i in range(len(alone)) if not is_same(alone[i], crowd[i])]
    timings = [answer.generation.timings for answer in crowd if answer.generation is not None]
    row = {
        "model": name,
        "backend": backend,
        "answers": len(alone),
        "failed": sum(answer.error is not None for answer in alone),
        "tokens": sum(len(answer.token_ids) for answer in alone),
        "drafted": sum(t.drafted_tokens for t in timings),
        "accepted": sum(t.accepted_tokens for t in timings),
        "differing": len(differing),
        "seconds_alone": round(seconds[0], 1),
        "seconds_in_a_crowd": round(seconds[1], 1),
    }
    print(json.dumps(row))
    for i in differing[:5]:
        print(f"{requests[i]}\n{alone[i].text!r}\n{crowd[i].text!r}\n", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
