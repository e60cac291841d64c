"""Copies text to the clipboard: by a program of the system, or by the terminal."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from phicore.errors import PhicoreError

LONGEST = 74_994
"""The most bytes that terminals take, in base64 (xterm's limit)."""


def programs(env: Mapping[str, str], platform: str) -> list[Sequence[str]]:
    """Return the commands that may copy their standard input here.

    Args:
        env: The environment variables.
        platform: The value of `sys.platform`.
    """
    if env.get("SSH_CONNECTION") or env.get("SSH_TTY"):
        return []  # they would copy on the other machine
    if platform == "darwin":
        return [["pbcopy"]]
    if platform == "win32":
        return [["clip"]]
    found: list[Sequence[str]] = []
    if env.get("WAYLAND_DISPLAY"):
        found.append(["wl-copy"])
    if env.get("DISPLAY"):
        found += [["xclip", "-selection", "clipboard"], ["xsel", "--clipboard", "--input"]]
    if env.get("WSL_DISTRO_NAME"):
        found.append(["clip.exe"])
    return found


def copy(text: str, write: Callable[[str], None] | None) -> str:
    """Copy a text to the clipboard.

    Args:
        write: Writes to the terminal; None if there is none that knows escape sequences.
    Returns:
        The way that was taken, as a part of a sentence.
    Raises:
        PhicoreError: If there is no way.
    """
    for command in programs(os.environ, sys.platform):
        if (path := shutil.which(command[0])) is None:
            continue
        # Windows' program takes UTF-16 with a byte order mark.
        encoding = "utf-16" if command[0].startswith("clip") else "utf-8"
        try:
            subprocess.run(
                [path, *command[1:]],
                input=text.encode(encoding),
                check=True,
                timeout=5,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return f"with {command[0]}"
    if write is None:
        raise PhicoreError(
            "there is no clipboard here: no terminal, and none of the programs pbcopy, wl-copy, "
            "xclip, xsel and clip; /save FILE.md writes a file"
        )
    encoded = base64.b64encode(text.encode()).decode()
    if len(encoded) > LONGEST:
        raise PhicoreError("the text is too long for the terminal; /save FILE.md writes a file")
    write(f"\x1b]52;c;{encoded}\a")
    return "by the terminal (OSC 52), if it allows that"
