"""Tests of Markdown that is rendered while it is written, on a screen that can be looked at."""

from __future__ import annotations

import io
import itertools
import os
import re

import pyte
import pytest
import rich.console
from hypothesis import example, given, settings
from hypothesis import strategies as st

from phicore.cli.markdown import MarkdownStream, new_console
from phicore.cli.terminal import printable

WIDTH = 40

DOCUMENT = """\
# A title

Some **bold text**, *more*, `code` and List<int>; a [link](http://x.y), <https://a.b>.
A second line of the same paragraph, which is longer than the terminal is wide.

1. one **x**
2. two
   - nested
   - more
3. three

- a
- b

  of b

```python
def f(x):
    '''Text
    that is long'''
    return x  # a comment that is longer than the terminal is wide
```

| a | b |
|---|---|
| 1 | 22 |
| 333 | 4 |

> quoted
> text

---

The *end*
"""


class Terminal:
    """A screen, and all that was written to it."""

    def __init__(self, lines: int = 100, columns: int = WIDTH) -> None:
        self.screen = pyte.HistoryScreen(columns, lines, history=10_000, ratio=1.0)
        self.stream = pyte.Stream(self.screen)
        self.written: list[str] = []
        self.now_s = 0.0
        self.console = rich.console.Console(
            file=io.StringIO(),
            force_terminal=True,
            color_system="standard",
            width=columns,
            height=lines,
            highlight=False,
        )

    def stream_of_markdown(self) -> MarkdownStream:
        return MarkdownStream(self.console, self.write, lambda: self.now_s)

    def write(self, text: str) -> None:
        self.written.append(text)
        self.stream.feed(text.replace("\n", "\r\n"))

    def shown(self) -> list[str]:
        buffer = [self.screen.buffer[y] for y in range(self.screen.lines)]
        rows = [*self.screen.history.top, *buffer]
        found = ["".join(row[x].data for x in range(self.screen.columns)).rstrip() for row in rows]
        while found and not found[-1]:
            found.pop()
        return found

    def styles(self) -> list[tuple[str, str, bool]]:
        """Return each character that is shown, with its colour and weight."""
        return [
            (cell.data, cell.fg, cell.bold)
            for y in range(self.screen.lines)
            for cell in (self.screen.buffer[y][x] for x in range(self.screen.columns))
        ]


def show(pieces: list[str], **size: int) -> Terminal:
    terminal = Terminal(**size)
    stream = terminal.stream_of_markdown()
    for piece in pieces:
        terminal.now_s += 1  # so each piece is drawn
        stream.push(piece)
    stream.close()
    return terminal


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, start = [], 0
    for size in itertools.cycle(sizes):
        if start >= len(text):
            return pieces
        pieces.append(text[start : start + size])
        start += size
    raise AssertionError


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=20)
MARKS = ["*", "**", "`", "```", "~~~", "\n", "\n\n", "- ", "1. ", "2. ", "# ", "> ", "---"]
OTHERS = [
    "| a ",
    "|",
    "|-|-|\n",
    "a",
    " a longer text ",
    "<b>",
    "&lt;",
    "[x](y)",
    "    ",
    "=",
    "\\",
    "日本",
]
PARTS = st.lists(st.sampled_from([*MARKS, *OTHERS]), max_size=25).map("".join)


@settings(max_examples=10)  # a long document
@given(SIZES)
@example([1])
def test_document_in_pieces_is_the_document_at_once(sizes: list[int]) -> None:
    streamed, at_once = show(cut(DOCUMENT, sizes)), show([DOCUMENT])
    assert streamed.shown() == at_once.shown()
    assert streamed.styles() == at_once.styles()


@given(PARTS, SIZES)
@example("```\n" * 3, [1])
@example("|-|-|\n```- `\n", [1])  # a fence that turns out to be none
@example("1. |-|-|\n1. **\n\n", [1])  # a mark that is never closed
@example("|-|-|\n**\n\n", [1])
@example("1. a\n\n2. b\n- c\n- d\n", [1])
def test_any_text_in_pieces_is_the_text_at_once(text: str, sizes: list[int]) -> None:
    assert show(cut(text, sizes)).shown() == show([text]).shown()


def test_document_is_rendered() -> None:
    lines = show([DOCUMENT]).shown()
    assert lines[:5] == [
        "A title",
        "",
        "Some bold text, more, code and",
        "List<int>; a link (http://x.y),",
        "https://a.b.",
    ]
    assert " 3 three" in lines
    assert "    • nested" in lines
    start = lines.index("```python")
    assert lines[start + 1 : start + 3] == ["def f(x):", "    '''Text"]
    assert "▌ quoted" in lines
    assert lines[-1] == "The end"


@pytest.mark.parametrize("height", [5, 9])
def test_text_longer_than_the_screen_leaves_the_scrollback_whole(height: int) -> None:
    """What has left the screen is there once, in order, with nothing missing."""
    words = [f"word{i}" for i in range(200)]
    code = [f"line {i}" for i in range(50)]
    items = [f"{i}. item {i}" for i in range(1, 30)]
    text = " ".join(words) + "\n\n```\n" + "\n".join(code) + "\n```\n\n" + "\n".join(items) + "\n"
    small = show(cut(text, [3]), lines=height).shown()
    assert small == show([text], lines=500).shown()
    assert re.findall(r"word\d+", "\n".join(small)) == words
    assert [line for line in small if line.startswith("line")] == code


def test_code_that_is_half_written_does_not_flicker() -> None:
    """A line of code that is complete is written once more at most, when its block is drawn."""
    code = "".join(f"value_{i} = {i}\n" for i in range(30))
    terminal = show(cut(f"```python\n{code}```\n", [4]))
    plain = re.sub(r"\x1b\[[\d;]*m", "", "".join(terminal.written))
    for i in range(30):
        assert plain.count(f"value_{i} = {i}\n") <= 2


def test_marks_at_the_end_are_not_shown_before_it_is_clear_what_they_are() -> None:
    terminal, shown = Terminal(), []
    stream = terminal.stream_of_markdown()
    text = "A **bo|ld|** wo|rd\n\n|``|`\nx = |1\n|``|`\n|-|-|-"
    for terminal.now_s, piece in enumerate(text.split("|")):
        stream.push(piece)
        shown.append(terminal.shown())
    assert not any("*" in line for lines in shown for line in lines)
    assert shown[1] == ["A bold"]
    assert all(line in ("A bold word", "", "```", "x =", "x = 1") for line in shown[-1])
    stream.close()
    assert terminal.shown()[-1] == "-" * WIDTH


def test_paragraph_keeps_its_line_breaks() -> None:
    """A haiku is three lines."""
    assert show(["one\ntwo\nthree\n"]).shown() == ["one", "two", "three"]


@given(
    st.text(max_size=40)
    | st.lists(st.sampled_from("\x1b\x9b\x07[]0;31m\ra`&#27;&#155;\n")).map("".join)
)
@example("\x1b]0;title\x07 \x1b[2J \x9b31m &#27;[2J &#x9b;2J `\x1b[2J` \x08\x7f")
def test_no_control_character_of_the_text_reaches_the_terminal(text: str) -> None:
    terminal = show([text, "\n```\n", text, "\n```\n[", text, "](", text, ")"])
    written = "".join(terminal.written)
    rest = re.sub(r"\x1b\[(\d*;?)*[mAJ]|\r", "", written)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", rest.replace("\t", ""))
    assert "\x1b[2J" not in written


@given(st.text())
def test_printable_keeps_what_is_no_control_character(text: str) -> None:
    shown = printable(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    kept = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)
    assert re.sub("[\u2400-\u2421\ufffd]", "", shown) == re.sub("[\u2400-\u2421\ufffd]", "", kept)


@pytest.mark.parametrize("width", [30, 60])
def test_width_that_changes_loses_nothing(width: int) -> None:
    """The block that is being written is shown once more, however often the width has changed."""
    terminal = Terminal(lines=60, columns=60)
    terminal.console.width = WIDTH
    stream = terminal.stream_of_markdown()
    stream.push("before\n\n")
    for i in range(100):
        if 50 <= i < 60:
            terminal.console.width = WIDTH + 2 * i - 100  # its edge is moved
        if i == 60:
            terminal.console.width = width
        terminal.now_s += 1 if i < 50 else 0.1
        stream.push(f"word{i} ")
    stream.close()
    text = " ".join(terminal.shown())
    words = re.findall(r"word\d+|before", text[text.rindex("word0 ") :])
    assert words == [f"word{i}" for i in range(100)]
    assert text.count("word0 ") == 2
    assert text.count("before") == 1


def test_other_output_amid_a_block_loses_nothing() -> None:
    terminal = Terminal()
    stream = terminal.stream_of_markdown()
    for i in range(100):
        if i == 50:
            terminal.write("reading again\n")
            stream.restart()
        terminal.now_s += 1
        stream.push(f"word{i} ")
    stream.close()
    text = " ".join(terminal.shown())
    assert text.count("reading again") == 1
    assert text.partition("again ")[2] == " ".join(f"word{i}" for i in range(100))


def test_text_is_drawn_a_few_times_a_second_only() -> None:
    terminal = Terminal()
    stream = terminal.stream_of_markdown()
    for _ in range(500):
        terminal.now_s += 0.002
        stream.push("word ")
    assert 10 < len(terminal.written) <= 21
    stream.close()
    assert " ".join(terminal.shown()).count("word") == 500


def test_no_colour_where_nobody_wants_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    console = new_console()
    written: list[str] = []
    stream = MarkdownStream(console, written.append)
    stream.push(DOCUMENT)
    stream.close()
    styles = re.findall(r"\x1b\[([\d;]*)m", "".join(written))
    assert styles
    assert not any(re.search(r"(^|;)(3[0-8]|4[0-8]|9\d)", style) for style in styles)
    assert os.environ["NO_COLOR"]
