"""Measures a server of OpenAI's API as its clients see it, several servers in turn.

    python benchmarks/serving.py                                # starts phicore serve
    python benchmarks/serving.py --llama-cpp python             # and llama-cpp-python's server
    python benchmarks/serving.py --url a=http://127.0.0.1:8080  # a server that runs already

For each number of clients, each client sends requests one after the other. Printed are the times
to the first token and between tokens (median and 95th percentile over all requests) and the tokens
per second of all clients together. With a shared prefix, all prompts begin with the same long
system message, as in a program with instructions; a prefix cache then reads it once.

`--llama-cpp` wants a Python with the package llama-cpp-python[server]. Its server computes one
answer at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from clients import Connection, command_at, served

from phicore.sources import resolve

WORDS = ["sea", "wind", "ship", "sail", "wave", "storm", "island", "harbour", "light", "star"]


@dataclass
class Figures:
    """What was measured with some number of clients."""

    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    tokens: int = 0
    failed: int = 0
    took_s: float = 0.0

    def row(self) -> dict[str, float]:
        first, between = sorted(self.first_s) or [0.0], sorted(self.between_s) or [0.0]
        return {
            "first_token_s": statistics.median(first),
            "first_token_p95_s": first[int(0.95 * len(first))],
            "between_tokens_s": statistics.median(between),
            "between_tokens_p95_s": between[int(0.95 * len(between))],
            "tokens_per_s": self.tokens / self.took_s,
            "requests": len(self.first_s),
            "failed": self.failed,
        }


def prompt_of(number: int, words: int) -> str:
    """Return a text that no other number has."""
    chosen = [WORDS[(number * 7 + i * i + i // 3) % len(WORDS)] for i in range(words)]
    return f"{number}: " + " ".join(chosen)


async def ask(url: str, body: dict[str, Any], figures: Figures) -> None:
    """Send a request, and note the times of its tokens."""
    started = last = time.perf_counter()
    tokens = 0
    async with Connection(url) as connection:
        await connection.send("POST", "/v1/chat/completions", json.dumps(body).encode())
        if await connection.head() != 200:
            figures.failed += 1
            await asyncio.sleep(0.1)
            return
        async for event in connection.events():
            choices = event.get("choices")
            if not choices or not choices[0]["delta"].get("content"):
                if usage := event.get("usage"):
                    tokens = usage["completion_tokens"]
                continue
            now = time.perf_counter()
            (figures.between_s if tokens else figures.first_s).append(now - last)
            last, tokens = now, tokens + 1
    figures.tokens += tokens
    figures.failed += last == started  # an answer without a token


async def measure(
    url: str, clients: int, requests: int, *, words: int, shared: int, max_tokens: int, first: int
) -> Figures:
    """Let clients send requests at the same time."""
    figures = Figures()
    system = {"role": "system", "content": prompt_of(0, shared)}

    async def client(number: int) -> None:
        for turn in range(requests):
            question = prompt_of(first + number * requests + turn, words)
            messages = [system] * bool(shared) + [{"role": "user", "content": question}]
            body = {
                "messages": messages,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            await ask(url, body, figures)

    started = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    figures.took_s = time.perf_counter() - started
    return figures


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2", help="the model, a reference as of phicore")
    parser.add_argument("--backend", default="jax")
    parser.add_argument("--parallel", type=int, default=8, help="rows of phicore serve")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python with llama-cpp-python")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--clients", default="1,4,16,64")
    parser.add_argument("--requests", type=int, default=4, help="requests of each client")
    parser.add_argument("--words", type=int, default=40, help="words of a question")
    parser.add_argument("--shared", default="0,300", help="words of the shared prefix")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    counts = [int(count) for count in args.clients.split(",")]
    lengths = [int(length) for length in args.shared.split(",")]

    with contextlib.ExitStack() as stack:
        servers = dict(given.split("=", 1) for given in args.url)
        if not servers:
            options = ("-m", args.model, "-b", args.backend, "--warmup", "--max-queue", "1000")
            url, _ = stack.enter_context(served(*options, "--parallel", str(args.parallel)))
            servers["phicore"] = url
        if args.llama_cpp:
            url = f"http://127.0.0.1:{(port := free_port())}"
            path = str(resolve(args.model).path)
            command = [args.llama_cpp, "-m", "llama_cpp.server", "--model", path]
            command += ["--port", str(port), "--n_ctx", "2048", "--interrupt_requests", "false"]
            stack.enter_context(command_at(command, url))
            servers["llama.cpp"] = url
        rows = []
        first = 1
        for shared in lengths:
            for count in counts:
                for name, url in servers.items():  # in turn, so that a busy machine harms each
                    figures = asyncio.run(
                        measure(
                            url,
                            count,
                            args.requests,
                            words=args.words,
                            shared=shared,
                            max_tokens=args.max_tokens,
                            first=first,
                        )
                    )
                    rows.append({"server": name, "shared": shared, "clients": count})
                    rows[-1] |= figures.row()
                    print(json.dumps(rows[-1]), file=sys.stderr)
                first += count * args.requests
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        "server      shared  clients  first token (95 %), s  between (95 %), ms  tokens/s  failed"
    )
    for row in rows:
        print(
            f"{row['server']:10}  {row['shared']:6}  {row['clients']:7}  "
            f"{row['first_token_s']:9.3f} ({row['first_token_p95_s']:.3f})  "
            f"{1000 * row['between_tokens_s']:9.1f} ({1000 * row['between_tokens_p95_s']:.1f})  "
            f"{row['tokens_per_s']:8.1f}  {row['failed']:6}"
        )


if __name__ == "__main__":
    main()
