"""The output of commands to people: progress, figures and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING

from phicore.progress import AGAIN

if TYPE_CHECKING:
    from rich.status import Status

    from phicore.generation import Generation
    from phicore.model import Model

LOG_EVERY_S = 10.0


class Console:
    """Prints on standard error: live progress on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        import rich.console

        self._rich = rich.console.Console(stderr=True, highlight=False)
        self._has_text = False

    def say(self, line: str) -> None:
        """Print a line."""
        # The terminal itself breaks a line with a long path in it, so that it can be copied.
        is_broken = max(map(len, line.split()), default=0) >= self._rich.width
        soft_wrap = is_broken or not self._rich.is_terminal or self._rich.is_dumb_terminal
        self._rich.print(printable(line), style="dim", markup=False, soft_wrap=soft_wrap)

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Print a table whose first row is its head; it takes the width that there is."""
        import rich.box
        import rich.table
        from rich.text import Text

        if not self._rich.is_terminal or self._rich.is_dumb_terminal:
            for line in plain_table(rows):
                self._rich.print(Text(printable(line)), soft_wrap=True)
            return
        framed = rich.table.Table(
            box=None, pad_edge=False, header_style="dim", show_header=any(rows[0])
        )
        for column in rows[0]:
            framed.add_column(Text(column), overflow="fold")
        for row in rows[1:]:
            framed.add_row(*(Text(printable(cell)) for cell in row))
        self._rich.print(framed)

    def text_begins(self) -> None:
        """Show no more progress, since generated text may be on the same screen from now on."""
        self._has_text = True

    def text_ends(self) -> None:
        """Show progress again."""
        self._has_text = False

    @contextmanager
    def progress(self) -> Iterator[ProgressLine]:
        """Return a context in which a `ProgressLine` shows progress."""
        is_live = self._rich.is_terminal and not self._rich.is_dumb_terminal
        status = self._rich.status("", spinner="dots") if is_live else None
        try:
            yield ProgressLine(status, self.say, lambda: self._has_text)
        finally:
            if status is not None:
                status.stop()


class ProgressLine:
    """Shows progress: in one temporary line on a terminal, in several lines elsewhere (a log).

    It can be called as a `Progress`.

    Args:
        status: The line on a terminal, or None.
        say: Prints a line in a log.
        is_over: Returns whether to show no more progress.
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
        """Show the share of some work that is done; in a log, its time when it is finished.

        Progress is not shown after text has begun, unless the text waits for long work.
        """
        if self._is_over():
            if what != AGAIN:
                return
            if done == 0 and self._status is not None:
                self._say("")  # the text goes on in a new line
        begun = self._started.setdefault(what, time.perf_counter())
        share = f" {done / total:4.0%}" if total > 1 else ""
        self._show(f"{what}{share}")
        if done == total:
            if self._status is not None:
                self._status.stop()
            else:
                self._say(f"{what}: {time.perf_counter() - begun:.1f} s")
            del self._started[what]

    def stop(self) -> None:
        """Show nothing more about work that was interrupted."""
        if self._status is not None:
            self._status.stop()
        self._started.clear()

    def tell(self, text: str) -> None:
        """Show a text about long work; in a log, at most one every `LOG_EVERY_S` seconds."""
        self._show(text)
        if self._status is None and time.perf_counter() - self._last_s >= LOG_EVERY_S:
            self._say(text)
            self._last_s = time.perf_counter()

    def _show(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)
            self._status.start()


def printable(text: str) -> str:
    """Replace characters that control a terminal by pictures of them, such as ␛.

    A text from a model, or from a file, is not trusted: it could change the terminal's settings or
    clear the screen. Newlines and tabs stay, and carriage returns are dropped.
    """
    return text.translate(_PICTURES)


_PICTURES = {
    **{code: chr(0x2400 + code) for code in range(0x20)},
    **dict.fromkeys(range(128, 160), "�"),
    0x7F: "\u2421",
    ord("\n"): "\n",
    ord("\t"): "\t",
    ord("\r"): None,
}


def duration(seconds: float) -> str:
    """Format a time: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def stats_lines(model: Model, generation: Generation) -> list[str]:
    """Format the seed, times, speeds and memory of a generation as lines of text."""
    t = generation.timings
    known = f" ({t.cached_tokens} known)" if t.cached_tokens else ""
    lines = [
        f"model {model.path.name}, backend {model.backend}, seed {generation.seed}",
        f"load {model.load_s:.2f} s, compile {t.compile_s:.2f} s, "
        f"first token {t.first_token_s:.2f} s",
        f"prompt {_tokens(t.prompt_tokens)}{known}, {_speed(t.prompt_tokens_per_s)}; "
        f"generated {_tokens(t.generated_tokens)}, {_speed(t.decode_tokens_per_s)}",
    ]
    if t.drafted_tokens:
        lines[-1] += f"; guessed {t.drafted_tokens}, {t.accepted_tokens} of them right"
    if t.again_s:
        lines[-1] += f"; read again in {t.again_s:.2f} s"
    peak = model.peak_memory_bytes()
    if peak is not None:
        lines.append(f"peak memory {size(peak)}")
    return lines


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.1f} tokens/s" if tokens_per_s > 0 else "- tokens/s"


def size(size_bytes: int) -> str:
    """Format a number of bytes with a decimal unit: `98.4 MB`."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output: styled on a terminal, plain elsewhere, never truncated."""
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
    for line in plain_table([columns, *rows]):
        print(line)


def plain_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format a table as lines of text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
