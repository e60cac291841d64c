"""ik_llama.cpp, through the programs that it is built with.

It has no Python package, so its `llama-bench` and, beside it, `llama-batched-bench` are run for
each measurement: they load the file, warm up and measure once. So a step's time is the mean of its
run, where the other engines' is the median. Keys and values are float16, with flash attention; the
file is mapped and not repacked (`-rtr 0`, the default).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, Self

from engines.worker import EngineEnded

BATCH = 512  # as with llama.cpp
POLL_S = 0.02
MANY = "llama-batched-bench"


class Programs:
    """Answers the requests of `Worker.ask` by running programs; it holds no process between."""

    def __init__(self, program: str, model: str, threads: int) -> None:
        """Take the path of `llama-bench`."""
        self._program = Path(program)
        self._model = model
        self._threads = threads
        self._peak_bytes = 0

    def ask(self, command: str, *args: Any) -> Any:
        """Answer as `Worker.ask` does; the answer is None for what the programs do not measure.

        Raises:
            EngineEnded: If a program fails or prints something else than it is known to print.
        """
        method = getattr(self, command, None)
        return None if method is None else method(*args)

    def about(self) -> str:
        found = self._bench("-p", "1", "-n", "0", "-w", "0")
        return f"ik_llama.cpp {found['build_commit']} (build {found['build_number']})"

    def prefill(self, count: int) -> float:
        return count / self._bench("-p", str(count), "-n", "0")["avg_ts"]

    def first_token(self, count: int) -> float:
        return count / self._bench("-p", str(count), "-n", "0", "-w", "0")["avg_ts"]

    def decode(self, steps: int, depth: int) -> float:
        if depth <= 1:
            return 1 / self._bench("-p", "0", "-n", str(steps))["avg_ts"]
        return 1 / self._bench("-p", "0", "-n", "0", "-gp", f"{depth},{steps}")["avg_ts"]

    def after(self, steps: int, depth: int) -> tuple[float, float]:
        return self.prefill(depth), self.decode(steps, depth)

    def decode_many(self, steps: int, count: int) -> float:
        """Measure with `llama-batched-bench`, each sequence after a prompt of one token."""
        sizes = ("-npp", "1", "-ntg", str(steps), "-npl", str(count), "-c", str(256 * count))
        printed = self._run(self._program.with_name(MANY), *sizes, "-fa", "on")
        return 1 / batched_tokens_per_s(printed, count)

    def peak_bytes(self) -> int:
        """Return the peak resident memory of the programs so far."""
        return self._peak_bytes

    def _bench(self, *options: str) -> dict[str, Any]:
        printed = self._run(self._program, *options, "-fa", "1", "-r", "1", "-o", "json")
        try:
            return json.loads(printed[printed.index("[") : printed.rindex("]") + 1])[-1]
        except (ValueError, IndexError):
            raise EngineEnded(f"{self._program.name} printed no JSON: {printed[-200:]!r}") from None

    def _run(self, program: Path, *options: str) -> str:
        sizes = ("-t", str(self._threads), "-b", str(BATCH), "-ub", str(BATCH))
        command = [str(program), "-m", self._model, *sizes, *options]
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        except OSError as error:
            raise EngineEnded(f"{program}: {error.strerror}") from None
        with process:
            while True:
                self._peak_bytes = max(self._peak_bytes, _peak_bytes(process.pid))
                try:
                    printed, said = process.communicate(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        if process.returncode:
            reason = (said.strip().splitlines() or [""])[-1]
            raise EngineEnded(f"{program.name} ended with {process.returncode}: {reason}")
        return printed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def batched_tokens_per_s(printed: str, count: int) -> float:
    """Return the speed of generation, of all sequences, from the table of `llama-batched-bench`.

    Raises:
        EngineEnded: If the table has no row for this number of sequences.
    """
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) == 10 and cells[2] == str(count):
            return float(cells[7])
    raise EngineEnded(f"{MANY} printed no row for {count} sequences: {printed[-200:]!r}")


def _peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    _, found, rest = status.partition("VmHWM:")
    return int(rest.split()[0]) * 1024 if found else 0
