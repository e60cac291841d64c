"""Make docs/terminal.svg: run the README's command and draw what a terminal shows.

uv run tools/terminal_picture.py
"""

import io
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = ["generate", "--seed", "2", "Give me three tips for better sleep."]


def main() -> None:
    arguments = " ".join(f'"{a}"' if " " in a else a for a in COMMAND)
    done = subprocess.run(
        [sys.executable, "-m", "phicore", *COMMAND], capture_output=True, text=True, check=True
    )
    notes = done.stderr.splitlines()
    console = Console(record=True, width=92, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), f"uv run phicore {arguments}"))
    console.print(Text(notes[0], style="dim"))
    console.print(Text(done.stdout.rstrip()))
    # On a terminal, the lines about loading and compiling disappear once they are done.
    for line in (n for n in notes[1:] if not n.startswith(("loading:", "compiling:", "prompt:"))):
        console.print(Text(line, style="dim"))
    picture = console.export_svg(title="phicore")
    # without web fonts, which a viewer would have to download
    picture = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
    Path(__file__).parent.parent.joinpath("docs", "terminal.svg").write_text(picture)


if __name__ == "__main__":
    main()
