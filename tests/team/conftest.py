"""Fixtures for the tests of processes that compute one model."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from api.tiny_models import write_endless, write_tiny

from phicore.team.protocol import KEY


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "a secret of the tests")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_endless(tmp_path_factory.mktemp("models") / "endless.gguf")


@pytest.fixture(scope="session")
def find_address() -> Callable[[], str]:
    """Return a function that finds an address whose port, and the next one, are free."""

    def find() -> str:
        while True:
            with socket.socket() as one, socket.socket() as two:
                one.bind(("127.0.0.1", 0))
                port = one.getsockname()[1]
                try:
                    two.bind(("127.0.0.1", port + 1))
                except (OSError, OverflowError):
                    continue
                return f"127.0.0.1:{port}"

    return find


@pytest.fixture
def address(find_address: Callable[[], str]) -> str:
    return find_address()
