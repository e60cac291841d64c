"""Renders Markdown on a terminal while it is written.

Blocks that are finished are printed once and for all, so the terminal can scroll them. Only the
last block is drawn again when text is added to it, and of this block only the lines that change.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import rich.console
import rich.markdown
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from phicore.cli.terminal import printable

REDRAWS_PER_S = 20
LARGEST_SHARE = 0.2
"""The largest share of the time that drawing may take."""
SETTLED_S = 0.5
"""The time after a change of the terminal's width in which nothing is drawn."""

_THEME = Theme({"markdown.code": "cyan", "markdown.h1": "bold underline"})
# HTML is text: a model that writes `List<int>` means the brackets.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
# At the end of an unfinished text, marks may become something else, and are not shown yet.
_OPEN_MARKS = re.compile(r"[*_`~ ]+\Z")
_OPEN_LINE = re.compile(r"^[ \t]*(?:[-+=#>|: \t]+|\d{1,9}[.)]?[ \t]*)\Z", re.MULTILINE)
_STYLE = re.compile(r"\x1b\[[\d;]*m")
_TRAILING = re.compile(rf" +((?:{_STYLE.pattern})*)$")


def new_console() -> rich.console.Console:
    """Return a console for standard output, with the styles of rendered Markdown."""
    return rich.console.Console(theme=_THEME, highlight=False)


class MarkdownStream:
    """Renders a text that comes in pieces.

    Args:
        console: The console of a terminal.
        write: Writes to the terminal.
        clock: Returns the time in seconds.
    """

    def __init__(
        self,
        console: rich.console.Console,
        write: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._console = console
        self._clock = clock
        self._live = LiveLines(write)
        self._text = ""  # of the last block
        self._goes_on = False  # whether the last block is a further item of a list
        self._is_first = True
        self._next_s = 0.0
        self._width = console.width

    def push(self, text: str) -> None:
        """Add a piece of text. It may be shown only a little later."""
        self._text += printable(text)
        started = self._clock()
        if self._console.width != self._width:  # a person may still be moving the window's edge
            self._width = self._console.width
            self._next_s = started + SETTLED_S
        if text and started >= self._next_s:
            self._draw(_settled(self._text), is_over=False)
            took_s = self._clock() - started
            self._next_s = started + max(1 / REDRAWS_PER_S, took_s / LARGEST_SHARE)

    def restart(self) -> None:
        """Show the last block once more, since something else was written after it."""
        self._live.keep()

    def close(self) -> None:
        """Show the rest of the text."""
        self._draw(self._text, is_over=True)

    def _draw(self, text: str, *, is_over: bool) -> None:
        blocks = _blocks(text) if is_over else _blocks_of_unfinished(text)
        if not blocks:
            return
        blocks[0].goes_on |= self._goes_on
        finished = len(blocks) if is_over else _finished(blocks, text)
        for block in blocks[:finished]:
            self._live.show(self._rendered(block), self._console.size)
            self._live.keep()
            self._is_first = False
        if is_over:
            return
        lines: list[str] = []
        for block in blocks[finished:]:
            lines += self._rendered(block, is_first=self._is_first and not lines)
        self._live.show(lines, self._console.size)
        rest = blocks[finished]
        self._text = "".join(self._text.splitlines(keepends=True)[rest.start_line :])
        self._goes_on = rest.goes_on

    def _rendered(self, block: Block, is_first: bool | None = None) -> list[str]:
        """Return the lines of a block, with escape sequences for styles, without space at ends.

        A blank line is in front, unless the block is the first one or goes on with a list.
        """
        with self._console.capture() as capture:
            self._console.print(_Markdown(block.tokens), end="")
        found = [_TRAILING.sub(r"\1", line) for line in capture.get().split("\n")]
        is_text = [bool(_STYLE.sub("", line)) for line in found]
        if not any(is_text):
            return []
        found = found[is_text.index(True) : len(found) - is_text[::-1].index(True)]
        is_first = self._is_first if is_first is None else is_first
        return found if block.goes_on or is_first else ["", *found]


class LiveLines:
    """Lines at the end of what a terminal shows, which can be replaced.

    Lines that have left the screen stay as they are. If the terminal becomes wider or narrower,
    all lines do, and the new ones come after them.

    Args:
        write: Writes to the terminal.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._lines: list[str] = []
        self._width = 0

    def show(self, lines: Sequence[str], size: rich.console.ConsoleDimensions) -> None:
        """Replace the lines. The cursor is in the line after them, before and afterwards."""
        if size.width != self._width:  # the terminal may have broken old lines anew
            self._width, self._lines = size.width, []
        old = self._lines
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(old, lines, strict=False))))
        kept = max(same, len(old) - (size.height - 1))
        up = len(old) - kept
        if up or lines[kept:]:
            back = f"\x1b[{up}A\r\x1b[J" if up else ""
            self._write(back + "".join(f"{line}\n" for line in lines[kept:]))
        self._lines = [*old[:kept], *lines[kept:]]

    def keep(self) -> None:
        """Let the lines stay for ever."""
        self._lines = []


# ---- blocks ------------------------------------------------------------------------------------


@dataclass
class Block:
    """A block of the text at its highest level, or an item of a list there.

    Attributes:
        tokens: What the parser says about it.
        start_line: The number of its first line.
        goes_on: Whether it is an item of a list, but not the first one.
    """

    tokens: list[Token]
    start_line: int
    goes_on: bool = False


def _blocks(text: str) -> list[Block]:
    """Divide a text into blocks."""
    found: list[Block] = []
    for group in _groups(_PARSER.parse(text), 0):
        start = group[0]
        if start.type not in ("bullet_list_open", "ordered_list_open"):
            found.append(Block(group, _line(start)))
            continue
        for index, item in enumerate(_groups(group[1:-1], 1)):
            head = copy(start)
            head.attrs = {**start.attrs, "start": int(item[0].info or 0)}  # as the text has it
            found.append(Block([head, *item, group[-1]], _line(item[0]), goes_on=index > 0))
    for block in found:
        block.tokens = [_safe(token) for token in block.tokens]
    return found


def _finished(blocks: Sequence[Block], text: str) -> int:
    """Return how many blocks at the start cannot change any more, whatever follows the text.

    The last block is open. If its first line is incomplete, this line may still become a part of
    the block before, unless there is a blank line between them.
    """
    lines, start = text.split("\n"), blocks[-1].start_line
    is_sure = start < len(lines) - 1 or (start > 0 and not lines[start - 1].strip())
    return len(blocks) - (1 if is_sure else min(2, len(blocks)))


def _groups(tokens: Sequence[Token], level: int) -> list[list[Token]]:
    """Divide tokens into those of each block at a level."""
    found: list[list[Token]] = []
    for token in tokens:
        if token.level == level and token.nesting != -1:
            found.append([])
        found[-1].append(token)
    return found


def _line(token: Token) -> int:
    assert token.map is not None, "every block has a place"
    return token.map[0]


def _safe(token: Token) -> Token:
    """Return a token without control characters, with line breaks where the text has some.

    Entities, such as "&#27;", may have added control characters.
    """
    changed = copy(token)
    changed.type = "hardbreak" if token.type == "softbreak" else token.type
    changed.content = printable(token.content)
    changed.attrs = {
        n: printable(value) if isinstance(value, str) else value for n, value in token.attrs.items()
    }
    if token.children is not None:  # an address that is its own link is shown once
        changed.children = [_safe(t) for t in token.children if t.markup != "autolink"]
    return changed


def _settled(text: str) -> str:
    """Return a text without marks at its end that may still become something else."""
    return _OPEN_LINE.sub("", _OPEN_MARKS.sub("", text))


def _blocks_of_unfinished(text: str) -> list[Block]:
    """Divide a text into blocks as if what is open in its last line were closed."""
    blocks = _blocks(text)
    is_open = not re.search(r"\n[ \t]*\n\Z", text)  # nothing goes on after a blank line
    if blocks and is_open and (missing := _missing_marks(blocks[-1])):
        closed = _blocks(text.removesuffix("\n") + missing)
        if [block.start_line for block in closed] == [block.start_line for block in blocks]:
            blocks[-1] = closed[-1]
    return blocks


def _missing_marks(block: Block) -> str:
    """Return the marks that close what is open at the end of a block."""
    leaves = [t for t in block.tokens if t.type in ("inline", "fence", "code_block")]
    if not leaves or leaves[-1].type != "inline":
        return ""
    text = re.sub(r"(`+).+?\1", "", leaves[-1].content, flags=re.DOTALL)
    if ticks := re.search(r"`+", text):
        return ticks[0]
    return "**" if text.count("**") % 2 else ""


# ---- how elements look -------------------------------------------------------------------------


class _Paragraph(rich.markdown.Paragraph):
    @classmethod
    def create(cls, markdown: rich.markdown.Markdown, token: Token) -> _Paragraph:
        return cls(justify="default")


class _Heading(rich.markdown.Heading):
    LEVEL_ALIGN = dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), "default")


class _Code(rich.markdown.CodeBlock):
    """A block of code from the left margin on, without a background, so that it can be copied."""

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> rich.console.RenderResult:
        name = "" if self.lexer_name == "text" else self.lexer_name
        code = str(self.text).rstrip("\n")
        yield Text(f"```{name}", style="dim")
        lexer = Syntax("", self.lexer_name, theme="ansi_dark", background_color="default")
        highlighted = lexer.highlight(code)
        highlighted.rstrip()
        if highlighted:
            yield highlighted
        yield Text("```", style="dim")


class _Markdown(rich.markdown.Markdown):
    """Markdown that is parsed already."""

    elements = {  # noqa: RUF012  # rich declares it as a class attribute
        **rich.markdown.Markdown.elements,
        "paragraph_open": _Paragraph,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, tokens: list[Token], **options: Any) -> None:
        super().__init__("", hyperlinks=False, **options)
        self.parsed = tokens
