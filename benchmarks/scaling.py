"""Measures `phicore ray-serve`: throughput and memory of replicas, and what finds its prefix.

    python benchmarks/scaling.py throughput    # replicas that share the CPUs, beside phicore serve
    python benchmarks/scaling.py memory --replicas 1 2 4
    python benchmarks/scaling.py prefixes      # conversations that stay at a replica, or do not

It runs on one machine, whose CPUs the replicas share. Memory is told as Linux counts it (`Pss` in
/proc/PID/smaps_rollup): a page that several processes map counts for each as its share.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clients import post, served
from serving import measure, prompt_of

from phicore.backend.host import cpu_count


@contextlib.contextmanager
def replicated(*options: str) -> Iterator[str]:
    """Run `phicore ray-serve` on a free port until it is no longer needed; yield its address."""
    command = [sys.executable, "-m", "phicore", "ray-serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    try:
        for line in process.stderr:
            said += line
            if found := re.search(r"listening at (http://\S+)", line):
                yield found[1]
                return
        sys.exit(said)
    finally:
        process.terminate()
        process.wait()


def throughput(args: argparse.Namespace) -> None:
    """Print tokens per second of all clients together."""
    cpus = cpu_count()
    base = ("-m", args.model, "--max-queue", "1000")
    servers: list[tuple[str, Any]] = [("phicore serve", served(*base, "--parallel", "8"))]
    for count in args.replicas:
        options = (*base, "--replicas", str(count), "--num-cpus", str(cpus // count))
        servers.append((f"{count} replicas", replicated(*options, "--parallel", str(8 // count))))
    for name, server in servers:
        with server as found:
            url = found if isinstance(found, str) else found[0]
            for clients in args.clients:
                asyncio.run(_measure(url, 2 * clients, 1, 9000))  # each replica compiles
                figures = asyncio.run(_measure(url, clients, args.requests, 1))
                row = {"server": name, "clients": clients, **figures.row()}
                print(json.dumps(row), flush=True)


def _measure(
    url: str, clients: int, requests: int, first: int, words: int = 40, max_tokens: int = 64
) -> Any:
    return measure(
        url, clients, requests, words=words, shared=0, max_tokens=max_tokens, first=first
    )


def memory(args: argparse.Namespace) -> None:
    """Print the memory of the replicas, in MB."""
    for count in args.replicas:
        options = ("-m", args.model, "--replicas", str(count), "--ctx", "1024", "--no-sticky")
        with replicated(*options, "--prefix-cache", "0", "--kv-memory", "300MB") as url:
            asyncio.run(_measure(url, 3 * count, 1, 1, words=20, max_tokens=4))
            processes = [_memory(pid) for pid in _replicas()]
            total = {key: sum(each[key] for each in processes) for key in ("Rss", "Pss", "own")}
            print(json.dumps({"replicas": len(processes), **total, "each": processes}), flush=True)


def _replicas() -> list[int]:
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if each.read_bytes().startswith(b"ray::ServeReplica:phicore"):
                found.append(int(each.parent.name))
    return found


def _memory(pid: int) -> dict[str, int]:
    """Return the memory of a process in MB: Rss, Pss, and what no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kb = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
    own = kb["Private_Clean"] + kb["Private_Dirty"]
    return {"Rss": kb["Rss"] // 1000, "Pss": kb["Pss"] // 1000, "own": own // 1000}


def prefixes(args: argparse.Namespace) -> None:
    """Print the share of the prompts' tokens that was in the prefix cache."""
    for sticky in ("--sticky", "--no-sticky"):
        options = ("-m", args.model, "--replicas", "2", "--num-cpus", str(cpu_count() / 2), sticky)
        with replicated(*options, "--ctx", "2048") as url:
            found = asyncio.run(_conversations(url, args.conversations, args.turns))
            print(json.dumps({"router": sticky.lstrip("-"), **found}), flush=True)


async def _conversations(url: str, count: int, turns: int) -> dict[str, Any]:
    usages: list[dict[str, Any]] = []

    async def talk(number: int) -> None:
        messages = [{"role": "user", "content": prompt_of(number, 60)}]
        for turn in range(turns):
            body = {"messages": messages, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
            status, answer = await post(url, "/v1/chat/completions", body)
            assert status == 200, answer
            if turn:
                usages.append(answer["usage"])
            messages += [
                {"role": "assistant", "content": answer["choices"][0]["message"]["content"]},
                {"role": "user", "content": prompt_of(100 * number + turn, 20)},
            ]

    await asyncio.gather(*(talk(number) for number in range(count)))
    prompt = sum(each["prompt_tokens"] for each in usages)
    cached = sum(each["prompt_tokens_details"]["cached_tokens"] for each in usages)
    return {"turns": len(usages), "prompt_tokens": prompt, "cached": round(cached / prompt, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["throughput", "memory", "prefixes"])
    parser.add_argument("--model", default="smollm2", help="the model, a reference as of phicore")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--requests", type=int, default=3, help="requests of each client")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--conversations", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    {"throughput": throughput, "memory": memory, "prefixes": prefixes}[args.what](args)


if __name__ == "__main__":
    main()
