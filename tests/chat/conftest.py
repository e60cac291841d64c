"""Fixtures: chats with tiny models, which remember everything they tell the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from api.tiny_models import write_tiny

import phicore
from phicore.chat.answering import Answering
from phicore.chat.chat import Chat
from phicore.chat.store import Store
from phicore.model import Model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture
def model(tiny: Path) -> Iterator[Model]:
    with phicore.load(tiny, "numpy") as loaded:
        yield loaded


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "chats", 10**9)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def chat(model: Model, store: Store, told: list[str]) -> Chat:
    made = Chat(model, store=store, seed=1, tell=told.append)
    made.set("max_tokens", 8)
    return made


@pytest.fixture
def finish() -> Callable[[Answering], Answering]:
    """Return a function that runs an answer to its end."""

    def run(answering: Answering) -> Answering:
        with answering:
            for _ in answering:
                pass
        return answering

    return run
