"""Fixtures: a tiny model on every installed backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api.tiny_models import write_tiny

import phicore
from phicore import Model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def model(tiny: Path) -> Iterator[Model]:
    """Load the tiny model on the reference backend."""
    with phicore.load(tiny, backend="numpy") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def on_backend(tiny: Path, backend_name: str, ops: object) -> Iterator[Model]:
    """Load the tiny model on each installed backend in turn; `ops` skips unusable backends."""
    with phicore.load(tiny, backend=backend_name) as loaded:
        yield loaded
