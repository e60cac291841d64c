"""Tests that NOTICE names every part of the page of `phicore serve` that others have written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from release.building import ROOT

PAGE = ROOT / "phicore" / "server" / "page"
OWN_ENDINGS = (".css", ".html", ".js", ".svg")
"""How the names of files end that can be read; fonts, images and WebAssembly would be others'."""
MARKS = re.compile(
    r"copyright|\(c\) \d|©|@license|@preserve|licensed under|SPDX-|MIT License|sourceMappingURL",
    re.IGNORECASE,
)
LONGEST_LINE = 400
"""Only files that a program has made smaller have longer lines."""


def looks_foreign(path: Path) -> str | None:
    """Return why a file seems to be somebody else's, or None."""
    if path.suffix not in OWN_ENDINGS or ".min." in path.name:
        return f"a file {path.name}"
    text = path.read_text(encoding="utf-8")
    if (mark := MARKS.search(text)) is not None:
        return f"it says {mark[0]!r}"
    if max(map(len, text.splitlines()), default=0) > LONGEST_LINE:
        return "it is minified"
    return None


def named(notice: str) -> dict[str, str]:
    """Return the files that a notice names, each with what it says about them."""
    lines = re.findall(r"^(phicore/server/page/\S+): (.+)$", notice, re.MULTILINE)
    return dict(lines)


def test_each_part_of_others_in_the_page_is_named() -> None:
    notice = named((ROOT / "NOTICE").read_text(encoding="utf-8"))
    for path in PAGE.rglob("*"):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and name not in notice:
            assert looks_foreign(path) is None, f"{name}: {looks_foreign(path)}; name it in NOTICE"
    for name, about in notice.items():
        assert (ROOT / name).is_file(), f"NOTICE names {name}, which is not there"
        assert re.fullmatch(r".+ \d[\w.]*, \S.*", about), f"{name}: version and license are missing"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("marked.js", "/*! marked v15 (c) 2025 Christopher Jeffrey, MIT */"),
        ("purify.js", "// @license DOMPurify 3.2"),
        ("katex.min.js", "x"),
        ("prism.js", "var a=1;" * 100),
        ("inter.woff2", "x"),
        ("icons.css", "/* Licensed under MIT */"),
    ],
)
def test_a_part_of_others_is_noticed(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert looks_foreign(tmp_path / name) is not None


def test_lines_of_the_notice_are_read() -> None:
    text = "about\nphicore/server/page/js/x.js: x 1.2, MIT\nand more\n"
    assert named(text) == {"phicore/server/page/js/x.js": "x 1.2, MIT"}
