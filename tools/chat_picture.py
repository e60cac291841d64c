"""Make docs/chat.svg: run `phicore chat` on a terminal, and draw what the terminal shows.

uv run tools/chat_picture.py
"""

import io
import os
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from cli.screen import Terminal, terminal  # noqa: E402

COMMAND = ["chat", "--seed", "2"]
LINES = [
    "Write a short Python function that reverses a string.",
    "Give me three short tips for better sleep, as a list.",
    "/stats",
]
WIDTH, HEIGHT = 92, 60


def main() -> None:
    os.environ["PHICORE_DATA"] = tempfile.mkdtemp()
    os.environ["XDG_CONFIG_HOME"] = os.environ["PHICORE_DATA"]
    with terminal(*COMMAND, "--no-history", columns=WIDTH, lines=HEIGHT) as shown:
        for number, line in enumerate(LINES, start=1):
            shown.wait_for_prompt(number)
            shown.enter(line)
        shown.wait_for_prompt(len(LINES) + 1)
        shown.send("/re")
        shown.wait_for("Answer the last message anew.")
        rows = drawn(shown)
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), f"uv run phicore {' '.join(COMMAND)}"))
    for row in rows:
        console.print(row)
    picture = console.export_svg(title="phicore")
    # without web fonts, which a viewer would have to download
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    (ROOT / "docs" / "chat.svg").write_text(picture)


def drawn(shown: Terminal) -> list[Text]:
    """Return the lines of a screen, with their colours, without empty lines in a row."""
    found: list[Text] = []
    for y in range(HEIGHT):
        text = Text(overflow="crop", no_wrap=True)
        cells = [shown.screen.buffer[y][x] for x in range(WIDTH)]
        for style, run in groupby(cells, style_of):
            text.append("".join(cell.data for cell in run), style)
        text.rstrip()
        if text.plain or (found and found[-1].plain):
            found.append(text)
    return found


def style_of(cell) -> Style:
    """Return the style of a character on the screen."""

    def color(name: str) -> str | None:
        names = {"default": None, "brown": "yellow"}
        name = name.replace("bright", "bright_").replace("bright_brown", "bright_yellow")
        return names.get(name, f"#{name}" if re.fullmatch("[0-9a-f]{6}", name) else name)

    return Style(
        color=color(cell.fg),
        bgcolor=color(cell.bg),
        bold=cell.bold,
        italic=cell.italics,
        underline=cell.underscore,
        reverse=cell.reverse,
    )


if __name__ == "__main__":
    main()
