"""The text is the same whether the host or the device makes the random numbers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BACKENDS, make_backend

from phicore.backend import Backend
from phicore.engine import Engine, Request
from phicore.engine.runner import Runner
from phicore.network.sampling import Sampling
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model

SAMPLINGS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0),
    Sampling(temperature=1.2, top_k=30, top_p=0.95, min_p=0.01, repeat_penalty=1.1),
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.F32, tokenizer=False)


def engine(ops: Backend, path: Path, *, on_device: bool, steps: int = 1) -> Engine:
    ops.capabilities = replace(ops.capabilities, random_on_device=on_device, steps=steps)
    return engine_of(ops, path)


def texts(engine: Engine, count: int = 7) -> list[list[int]]:
    rng = random.Random(count)
    sequences = [
        engine.add(
            Request(
                [rng.randrange(80) for _ in range(rng.randint(1, 20))],
                rng.choice(SAMPLINGS),
                max_tokens=rng.randint(1, 25),
                seed=rng.choice([rng.randrange(2**64), rng.randrange(9), 2**64 - 1]),
            )
        )
        for _ in range(count)
    ]
    while not engine.is_idle:
        engine.step()
    return [sequence.answer for sequence in sequences]


def unused(self: Runner, *args: object) -> None:
    raise AssertionError("the host made random numbers")


@pytest.mark.complete_where(backend_name="jax")
@pytest.mark.complete_where(backend_name="mlx")
def test_texts_are_the_same(backend_name: str, path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = texts(engine(make_backend(backend_name), path, on_device=False))
    monkeypatch.setattr(Runner, "_uniforms", unused)
    assert texts(engine(make_backend(backend_name), path, on_device=True)) == expected


@pytest.mark.parametrize("name", [name for name in ("numpy", "jax") if name in BACKENDS])
def test_texts_are_the_same_with_several_steps_in_a_call(
    name: str, path: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = texts(engine(make_backend(name), path, on_device=False))
    monkeypatch.setattr(Runner, "_uniforms", unused)
    assert texts(engine(make_backend(name), path, on_device=True, steps=4)) == expected
