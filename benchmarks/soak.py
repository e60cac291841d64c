"""Lets many clients, some of them malicious, use the server for a while, and watches it.

    uv run benchmarks/soak.py --model tiny --minutes 20 --draft-model tiny

First a server that guesses nothing and remembers nothing answers some hundred random requests, one
after the other: chats and their next turns, completions, answers longer than the model's window,
schemas, expressions, tools, predictions, several choices. Then a server with little memory, which
guesses tokens, answers them to many clients at once. **Every** text, call and end must be what the
request gave alone, to the last bit, and each log probability to 1e-5. Other clients go away at any
moment, read slowly, and send bodies that are malformed, cut off or too large.

After each quarter of the time, the clients go, and the server rests. The first crowd makes it
compile steps and start the threads of its libraries.

Printed, as JSON: what was sent and compared; what went wrong that was not the client's fault;
memory, open files, threads and bytes of running answers in each rest. The exit code is 1 if
something went wrong, or if the server is in the last rest not as it was in the first.
`tiny` is a random model with a window of 100 tokens, which is written on the spot, and the tiny
draft model has another seed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients import Connection, post, served
from soak_requests import CHAT, Joined, Question, are_same, random_question, told

BAD: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"messages": 1}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "seed": "x"}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "tools": [{}]}',
    b"[" * 10000,
    json.dumps({"messages": [{"role": "user", "content": "word " * 20000}]}).encode(),
]
GROWTH_BYTES = 40_000_000
"""Memory that grows by more than this, 5 %, and what more compiled steps take, is a leak."""
LONG_S = 1200
"""In a shorter run, the later crowds still need steps that the first one did not."""
REST_S = 10
"""After so many seconds without work, the server has given back the memory that nothing uses."""
GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_bytes": "phicore:kv_cache_bytes",
    "prefix_bytes": "phicore:prefix_cache_bytes",
    "compiled_bytes": "phicore:compiled_functions_bytes",
}


class Soak:
    """The clients, and what they have seen.

    Args:
        url: The beginning of the server's addresses.
        questions: The requests whose answers are known.
        limit_s: How long a request may take.

    Attributes:
        sent: How many requests of each kind were sent.
        compared: How many answers were as expected, by the kind of the request.
        wrong: What went wrong that was not the client's fault.
        slowest_s: The longest time of a request that was answered.
    """

    def __init__(self, url: str, questions: list[Question], limit_s: float) -> None:
        self.url = url
        self.sent: Counter[str] = Counter()
        self.compared: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.slowest_s = 0.0
        self._questions = questions
        self._limit_s = limit_s

    async def client(self, rng: random.Random, end: float) -> None:
        """Send requests until the end."""
        kinds = [self.whole, self.stream, self.goes_away, self.bad, self.slow, self.cut]
        weights = [30, 30, 20, 10, 5, 5]
        while time.monotonic() < end:
            [kind] = rng.choices(kinds, weights)
            self.sent[kind.__name__] += 1
            try:
                async with asyncio.timeout(self._limit_s):
                    await kind(rng)
            except TimeoutError:
                self.wrong[f"{kind.__name__}: no end"] += 1
            except (OSError, EOFError, ValueError) as error:
                self.wrong[f"{kind.__name__}: {error!r:.80}"] += 1
            await asyncio.sleep(rng.random() * 0.05)

    async def each(self) -> None:
        """Send each request once, one after the other."""
        for question in self._questions:
            status, answer = await post(self.url, question.path, question.body)
            if self._has_answer(question.kind, status, answer):
                self._compare(question, told(answer))

    def _has_answer(self, kind: str, status: int, answer: Any) -> bool:
        """Note a wrong status; return whether there is an answer."""
        if status == 200:
            return True
        if status != 503 or answer["error"]["code"] != "queue_full":
            self.wrong[f"{kind}: {status} {answer}"[:150]] += 1
        else:
            self.sent["queue full"] += 1
        return False

    def _compare(self, question: Question, found: list[Any]) -> None:
        """Compare an answer with what the request gave alone."""
        if are_same(found, question.expected):
            self.compared[question.kind] += 1
            return
        number = self._questions.index(question)
        print(f"request {number}: {question.body}", file=sys.stderr)
        print(f"  expected {question.expected}\n  found {found}", file=sys.stderr)
        self.wrong[f"another answer to {question.kind} {number}"] += 1

    async def whole(self, rng: random.Random) -> None:
        question, started = rng.choice(self._questions), time.monotonic()
        status, answer = await post(self.url, question.path, question.body)
        if self._has_answer("whole", status, answer):
            self._compare(question, told(answer))
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)

    async def stream(self, rng: random.Random) -> None:
        question = rng.choice(self._questions)
        joined = Joined(question.body.get("n", 1))
        async with Connection(self.url) as connection:
            body = question.body | {"stream": True}
            await connection.send("POST", question.path, json.dumps(body).encode())
            if await connection.head() != 200:
                self._has_answer("stream", connection.status, await connection.json())
                return
            async for event in connection.events():
                if "choices" not in event:
                    self.wrong[f"stream: {event}"[:150]] += 1
                    return
                joined.add(event)
        self._compare(question, joined.choices)

    async def goes_away(self, rng: random.Random) -> None:
        question = rng.choice(self._questions)
        async with Connection(self.url) as connection:
            body = question.body | {"stream": rng.random() < 0.5, "max_tokens": 1000}
            await connection.send("POST", question.path, json.dumps(body).encode())
            await asyncio.sleep(rng.choice([0.0, 0.02, 0.3, 1.0]))

    async def bad(self, rng: random.Random) -> None:
        async with Connection(self.url) as connection:
            await connection.send("POST", CHAT, rng.choice(BAD))
            status = await connection.head()
            if status not in (400, 503):
                self.wrong[f"bad: {status}"] += 1

    async def slow(self, rng: random.Random) -> None:
        async with Connection(self.url) as connection:
            question = rng.choice(self._questions)
            body = question.body | {"stream": True}
            await connection.send("POST", question.path, json.dumps(body).encode())
            for _ in range(20):
                if not await connection.read_slowly(rng.choice([1, 20, 200])):
                    return
                await asyncio.sleep(0.1)

    async def cut(self, rng: random.Random) -> None:
        async with Connection(self.url) as connection:
            await connection.send("POST", CHAT, b'{"messages": [', length=5000)
            await asyncio.sleep(rng.random())


def state_of(pid: int) -> dict[str, int]:
    """Return the memory in bytes, the open files and the threads of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {
        "memory_bytes": 1024 * int(found["VmRSS"].split()[0]),
        "threads": int(found["Threads"]),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


async def watch(pid: int, states: list[dict[str, int]], every_s: float) -> None:
    while True:
        states.append(state_of(pid))
        await asyncio.sleep(every_s)


async def ask_alone(url: str, count: int, longest: int, seed: int) -> list[Question]:
    """Make random requests, and note what each gives while nobody else is served."""
    rng, found = random.Random(seed), list[Question]()
    for _ in range(count):
        question = random_question(rng, longest, found)
        status, answer = await post(url, question.path, question.body)
        if status != 200:
            raise SystemExit(f"{question.body}: {status} {answer}")
        question.expected = told(answer)
        found.append(question)
    return found


async def run(
    url: str, pid: int, questions: list[Question], args: argparse.Namespace
) -> dict[str, Any]:
    """Run all clients; return what they and the process have told."""
    soak, states = Soak(url, questions, limit_s=args.limit), list[dict[str, int]]()
    await soak.each()
    seconds = 60 * args.minutes
    watching = asyncio.create_task(watch(pid, states, max(seconds / 200, 0.2)))
    started = time.monotonic()
    rngs = [random.Random(args.seed + number) for number in range(args.clients)]
    rests = []
    for quarter in range(1, 5):
        end = started + seconds * quarter / 4
        await asyncio.gather(*(soak.client(rng, end) for rng in rngs))
        rests.append(await _settled(url, pid))
    watching.cancel()
    took_s = time.monotonic() - started
    before, after = rests[0], rests[-1]
    most = {"running": 0, "waiting": 0, "kv_bytes": 0, "files": before["files"]}
    if seconds >= LONG_S:
        most["threads"] = before["threads"]
        of_steps = max(0, after["compiled_bytes"] - before["compiled_bytes"])
        most["memory_bytes"] = round(1.05 * before["memory_bytes"]) + GROWTH_BYTES + of_steps
    for name, number in most.items():
        if after[name] > number:
            soak.wrong[f"{name}: {before[name]} before, {after[name]} after"] += 1
    return {
        "minutes": round(took_s / 60, 1),
        "sent": dict(soak.sent),
        "compared": dict(soak.compared),
        "wrong": dict(soak.wrong),
        "slowest_s": round(soak.slowest_s, 1),
        "memory_most_mb": round(max(state["memory_bytes"] for state in states) / 1e6),
        "files_most": max(state["files"] for state in states),
        "threads_most": max(state["threads"] for state in states),
        "rests": rests,
    }


async def _gauges(url: str) -> dict[str, int]:
    """Return what the server tells of its places."""
    async with Connection(url) as connection:
        await connection.send("GET", "/metrics")
        await connection.head()
        text = b"".join([part async for part in connection.parts()]).decode()
    found = {}
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        for short, metric in GAUGES.items():
            if name.startswith(f"{metric}{{"):
                found[short] = round(float(value))
    return found


async def _settled(url: str, pid: int) -> dict[str, int]:
    """Wait until nothing runs any more; return the state of the process."""
    for _ in range(300):
        gauges = await _gauges(url)
        if not (gauges["running"] or gauges["waiting"]):
            break
        await asyncio.sleep(0.1)
    else:
        raise SystemExit("answers still run although nobody waits for them")
    await asyncio.sleep(REST_S)
    return state_of(pid) | await _gauges(url)


def write_tiny(path: Path, seed: int) -> str:
    """Write a random model with a window, and return its path."""
    from phicore.testing.tiny_models import Q4_K_M, Tiny, write_model

    tiny = Tiny(sliding_window=100, max_position_embeddings=4000)
    return str(write_model(path, tiny, Q4_K_M, seed=seed))


@dataclass(frozen=True)
class Sizes:
    """Sizes that a model makes sensible.

    Attributes:
        longest: The number of tokens of the longest answers.
        kv_memory, prefix_cache: Little memory, so that answers wait and prefixes are evicted.
    """

    longest: int
    kv_memory: str
    prefix_cache: str


TINY, OTHERS = Sizes(900, "16MB", "3MB"), Sizes(300, "600MB", "100MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="a reference, or tiny")
    parser.add_argument("--draft-model", help="another model that guesses, or tiny")
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--requests", type=int, default=300, help="different requests")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one request")
    parser.add_argument("--longest", type=int, help="tokens of the longest answers")
    parser.add_argument("--kv-memory", help="little, so that requests wait for memory")
    parser.add_argument("--prefix-cache", help="small, so that it is soon full")
    parser.add_argument("--warmup", action="store_true", help="compile steps before")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    sizes = TINY if args.model == "tiny" else OTHERS
    longest = args.longest or sizes.longest
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model, draft = args.model, args.draft_model
        if model == "tiny":
            model = write_tiny(folder / "tiny.gguf", 1)
        if draft == "tiny":
            draft = write_tiny(folder / "draft.gguf", 2)
        common = ["-m", model, "-b", args.backend, "--ctx", "4000", "--log-level", "warning"]
        with served(*common, "--prefix-cache", "0", log=sys.stderr) as (url, _):
            questions = asyncio.run(ask_alone(url, args.requests, longest, args.seed))
        print(f"{len(questions)} requests were answered alone", file=sys.stderr)
        options = ["--kv-memory", args.kv_memory or sizes.kv_memory, "--speculation"]
        options += ["--prefix-cache", args.prefix_cache or sizes.prefix_cache]
        options += ["--draft-model", draft] if draft else []
        options += ["--warmup"] if args.warmup else []
        with served(*common, *options, log=sys.stderr) as (url, pid):
            found = asyncio.run(run(url, pid, questions, args))
    print(json.dumps(found, indent=2))
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
