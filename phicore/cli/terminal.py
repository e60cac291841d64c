"""What the command line shows beside its result: progress, figures, tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

    from phicore.model import Generation, Model

LOG_EVERY_S = 10.0


class Console:
    """Standard error: live progress on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        import rich.console

        self._rich = rich.console.Console(stderr=True, highlight=False)
        self._has_text = False

    def say(self, line: str) -> None:
        """Print a line."""
        self._rich.print(line, style="dim", markup=False, soft_wrap=True)

    def text_begins(self) -> None:
        """From here on the text may be on the same screen: no more progress."""
        self._has_text = True

    @contextmanager
    def progress(self) -> Iterator[ProgressLine]:
        """Show what is being done."""
        status = self._rich.status("", spinner="dots") if self._rich.is_terminal else None
        try:
            yield ProgressLine(status, self.say, lambda: self._has_text)
        finally:
            if status is not None:
                status.stop()


class ProgressLine:
    """What is being done: a line that vanishes on a terminal, lines in a log. A `Progress`.

    Args:
        status: The line on a terminal.
        say: Prints a line in a log.
        is_over: Whether to show nothing more.
    """

    def __init__(
        self, status: Status | None, say: Callable[[str], None], is_over: Callable[[], bool]
    ) -> None:
        self._status = status
        self._say = say
        self._is_over = is_over
        self._started: dict[str, float] = {}
        self._last_s = -inf

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show a share of some work; in a log, the time that it took."""
        if self._is_over():
            return  # it would cut the text in two
        begun = self._started.setdefault(what, time.perf_counter())
        share = f" {done / total:4.0%}" if total > 1 else ""
        self._show(f"{what}{share}")
        if done == total:
            if self._status is not None:
                self._status.stop()
            else:
                self._say(f"{what}: {time.perf_counter() - begun:.1f} s")
            del self._started[what]

    def tell(self, text: str) -> None:
        """Show how far long work is; in a log at once, and then every `LOG_EVERY_S` at most."""
        self._show(text)
        if self._status is None and time.perf_counter() - self._last_s >= LOG_EVERY_S:
            self._say(text)
            self._last_s = time.perf_counter()

    def _show(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)
            self._status.start()


def duration(seconds: float) -> str:
    """A time for people: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def stats_lines(model: Model, generation: Generation) -> list[str]:
    """What a generation took, as lines for people."""
    t = generation.timings
    lines = [
        f"model {model.path.name}, backend {model.backend}, seed {generation.seed}",
        f"load {model.load_s:.2f} s, compile {t.compile_s:.2f} s, "
        f"first token {t.first_token_s:.2f} s",
        f"prompt {_tokens(t.prompt_tokens)}, {_speed(t.prompt_tokens_per_s)}; "
        f"generated {_tokens(t.generated_tokens)}, {_speed(t.decode_tokens_per_s)}",
    ]
    peak = model.peak_memory_bytes()
    if peak is not None:
        lines.append(f"peak memory {size(peak)}")
    return lines


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.1f} tokens/s" if tokens_per_s > 0 else "- tokens/s"


def size(size_bytes: int) -> str:
    """A number of bytes for people, in powers of 1000: `98.4 MB`."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output: framed on a terminal, else plain. Nothing is cut off."""
    if sys.stdout.isatty():
        import rich.box
        import rich.console
        import rich.table

        framed = rich.table.Table(box=rich.box.SIMPLE_HEAD)
        for column in columns:
            framed.add_column(column, overflow="fold")
        for row in rows:
            framed.add_row(*(str(cell).replace("[", r"\[") for cell in row))
        rich.console.Console(highlight=False).print(framed)
        return
    cells = [list(columns), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
