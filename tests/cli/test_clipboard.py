"""Tests of the ways to a clipboard."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import pytest

from phicore.cli.clipboard import copy, programs
from phicore.errors import PhicoreError


@pytest.mark.parametrize(
    ("env", "platform", "expected"),
    [
        ({}, "darwin", ["pbcopy"]),
        ({}, "win32", ["clip"]),
        ({}, "linux", []),
        ({"DISPLAY": ":0"}, "linux", ["xclip", "xsel"]),
        ({"DISPLAY": ":0", "WAYLAND_DISPLAY": "w"}, "linux", ["wl-copy", "xclip", "xsel"]),
        ({"WSL_DISTRO_NAME": "d"}, "linux", ["clip.exe"]),
        ({"DISPLAY": ":0", "SSH_TTY": "/dev/pts/1"}, "linux", []),  # the clipboard is elsewhere
        ({"SSH_CONNECTION": "x"}, "darwin", []),
    ],
)
def test_programs(env, platform: str, expected: list[str]) -> None:
    assert [command[0] for command in programs(env, platform)] == expected


@pytest.fixture
def xclip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a program in the place of xclip that writes its input to a file."""
    if sys.platform != "linux":
        pytest.skip("the programs of Linux")
    program, copied = tmp_path / "xclip", tmp_path / "copied"
    program.write_text(f'#!/bin/sh\necho "$@" > {copied}.args\nexec cat > {copied}\n')
    program.chmod(0o755)
    for name in ("SSH_TTY", "SSH_CONNECTION", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return program


def test_program_gets_the_text(xclip: Path) -> None:
    written: list[str] = []
    assert copy("日本\n", written.append) == "with xclip"
    assert xclip.with_name("copied").read_text() == "日本\n"
    assert xclip.with_name("copied.args").read_text() == "-selection clipboard\n"
    assert written == []


def test_program_that_fails_leaves_it_to_the_terminal(xclip: Path) -> None:
    xclip.write_text("#!/bin/sh\nexit 1\n")
    written: list[str] = []
    assert copy("日本", written.append) == "by the terminal (OSC 52), if it allows that"
    [sequence] = written
    assert sequence.startswith("\x1b]52;c;")
    assert base64.b64decode(sequence[7:-1]).decode() == "日本"


def test_without_any_way_there_is_a_line(xclip: Path) -> None:
    xclip.unlink()
    with pytest.raises(PhicoreError, match="there is no clipboard here: no terminal, and none of"):
        copy("x", None)
    with pytest.raises(PhicoreError, match="the text is too long for the terminal"):
        copy("x" * 100_000, lambda text: None)
