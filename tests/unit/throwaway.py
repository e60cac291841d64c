"""A fixture for temporary distributions, which the interpreter finds like installed ones."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that makes a distribution and puts it on the import path.

    The distribution has one module and one entry point.
    """
    modules = []

    def call(distribution: str, name: str, code: str, version: str = "1.2") -> None:
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        module = f"throwaway_{distribution.replace('-', '_')}"
        modules.append(module)
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        (info / "entry_points.txt").write_text(f"[phicore]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(str(site))

    yield call
    for module in modules:
        sys.modules.pop(module, None)
