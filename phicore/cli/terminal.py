"""What the command line shows beside its result: progress, figures, tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from phicore.progress import Progress

if TYPE_CHECKING:
    from phicore.model import Generation, Model


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
    def progress(self) -> Iterator[Progress]:
        """Show loading and compiling: a line that vanishes on a terminal, lines in a log."""
        started: dict[str, float] = {}
        status = self._rich.status("", spinner="dots") if self._rich.is_terminal else None

        def show(what: str, done: int, total: int) -> None:
            if self._has_text:
                return  # it would cut the text in two
            begun = started.setdefault(what, time.perf_counter())
            share = f" {done / total:4.0%}" if total > 1 else ""
            if status is not None:
                status.update(f"{what}{share}")
                status.start()
            if done == total:
                if status is not None:
                    status.stop()
                else:
                    self.say(f"{what}: {time.perf_counter() - begun:.1f} s")
                del started[what]

        try:
            yield show
        finally:
            if status is not None:
                status.stop()


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
