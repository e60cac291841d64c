"""Lets many clients, some of them bad, use `phicore serve` for a while, and watches the process.

    python benchmarks/soak.py --minutes 10 --clients 64

Clients wait for answers, stream them, go away at random moments, read slowly, and send bodies that
are malformed, cut off or too large. One request in ten is always the same one, and its text must
be, too. Printed, as JSON: what was sent; what went wrong that was not the client's fault; memory,
open files and threads of the process over the time. The exit code is 1 if something went wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from clients import Connection, post, served

FIXED = {
    "messages": [{"role": "user", "content": "Why is the sea salty?"}],
    "max_tokens": 12,
    "seed": 7,
    "temperature": 1.0,
}
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
CHAT = "/v1/chat/completions"


class Soak:
    """The clients, and what they have seen.

    Attributes:
        url: The beginning of the server's addresses.
        sent: How many requests of each kind were sent.
        wrong: What went wrong that was not the client's fault.
    """

    def __init__(self, url: str, limit_s: float) -> None:
        self.url = url
        self.sent: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self._limit_s = limit_s
        self._fixed: set[str] = set()

    async def client(self, rng: random.Random, end: float) -> None:
        """Send requests until the end."""
        kinds = [self.fixed, self.whole, self.stream, self.goes_away, self.bad, self.slow, self.cut]
        weights = [10, 25, 25, 20, 10, 5, 5]
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

    def body(self, rng: random.Random, **more: Any) -> dict[str, Any]:
        words = " ".join(rng.choice(["sea", "wind", "é", "🦖", "ship"]) for _ in range(30))
        shared = "You are the captain of a ship. " * rng.choice([0, 10])
        options = {"max_tokens": rng.randint(1, 40), "seed": rng.randrange(1000)}
        return {"messages": [{"role": "user", "content": shared + words}], **options, **more}

    def check(self, kind: str, status: int, answer: Any) -> bool:
        """Note a wrong status; return whether there is an answer."""
        if status == 200:
            return True
        if status != 503 or answer["error"]["code"] != "queue_full":
            self.wrong[f"{kind}: {status} {answer}"[:150]] += 1
        else:
            self.sent["queue full"] += 1
        return False

    async def fixed(self, rng: random.Random) -> None:
        status, answer = await post(self.url, CHAT, FIXED)
        if self.check("fixed", status, answer):
            self._fixed.add(answer["choices"][0]["message"]["content"])
            if len(self._fixed) > 1:
                self.wrong["the same seed gave another text"] += 1

    async def whole(self, rng: random.Random) -> None:
        body = self.body(rng, n=rng.choice([1, 1, 1, 2]))
        self.check("whole", *await post(self.url, CHAT, body))

    async def stream(self, rng: random.Random) -> None:
        async with Connection(self.url) as connection:
            body = self.body(rng, stream=True)
            await connection.send("POST", CHAT, json.dumps(body).encode())
            if await connection.head() != 200:
                self.check("stream", connection.status, await connection.json())
                return
            events = [event async for event in connection.events()]
            reason = events[-1]["choices"][0]["finish_reason"] if "choices" in events[-1] else None
            if reason not in ("stop", "length"):
                self.wrong[f"stream: its last event is {events[-1]}"[:150]] += 1

    async def goes_away(self, rng: random.Random) -> None:
        async with Connection(self.url) as connection:
            body = self.body(rng, stream=rng.random() < 0.5, max_tokens=500)
            await connection.send("POST", CHAT, json.dumps(body).encode())
            await asyncio.sleep(rng.choice([0.0, 0.02, 0.3, 1.0]))

    async def bad(self, rng: random.Random) -> None:
        async with Connection(self.url) as connection:
            await connection.send("POST", CHAT, rng.choice(BAD))
            status = await connection.head()
            if status not in (400, 503):
                self.wrong[f"bad: {status}"] += 1

    async def slow(self, rng: random.Random) -> None:
        async with Connection(self.url) as connection:
            await connection.send(
                "POST", CHAT, json.dumps(self.body(rng, stream=True, max_tokens=60)).encode()
            )
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


async def run(url: str, pid: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run all clients; return what they and the process have told."""
    soak, states = Soak(url, limit_s=args.limit), []
    seconds = 60 * args.minutes
    end = time.monotonic() + seconds
    watching = asyncio.create_task(watch(pid, states, max(seconds / 200, 0.2)))
    rngs = [random.Random(args.seed + number) for number in range(args.clients)]
    await asyncio.gather(*(soak.client(rng, end) for rng in rngs))
    watching.cancel()
    after = await _settled(url, pid)
    quarter = max(len(states) // 4, 1)
    parts = [states[i * quarter : (i + 1) * quarter] for i in range(4)]
    memory = [statistics.median(s["memory_bytes"] for s in part) for part in parts if part]
    return {
        "sent": dict(soak.sent),
        "wrong": dict(soak.wrong),
        "memory_of_each_quarter_mb": [round(each / 1e6) for each in memory],
        "files_most": max(state["files"] for state in states),
        "threads_most": max(state["threads"] for state in states),
        "before": states[0],
        "after": after,
    }


async def _settled(url: str, pid: int) -> dict[str, int]:
    """Wait until nothing runs any more; return the state of the process."""
    for _ in range(300):
        async with Connection(url) as connection:
            await connection.send("GET", "/metrics")
            await connection.head()
            text = b"".join([part async for part in connection.parts()]).decode()
        counts = [
            float(line.split()[-1])
            for line in text.splitlines()
            if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
        ]
        if not any(counts):
            break
        await asyncio.sleep(0.1)
    else:
        raise SystemExit("answers still run although nobody waits for them")
    await asyncio.sleep(1)
    return state_of(pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one request")
    parser.add_argument("--prefix-cache", default="200MB", help="small, so that it is soon full")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    options = ["-m", args.model, "-b", args.backend, "--warmup", "--log-level", "warning"]
    options += ["--prefix-cache", args.prefix_cache]
    with served(*options, log=sys.stderr) as (url, pid):
        found = asyncio.run(run(url, pid, args))
    print(json.dumps(found, indent=2))
    sys.exit(1 if found["wrong"] else 0)


if __name__ == "__main__":
    main()
