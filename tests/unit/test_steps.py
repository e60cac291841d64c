"""Tests of several decode steps in one call: equal tokens, the right number, the end tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, make_backend
from gguf import GGMLQuantizationType as Type

from phicore.backend import Array, Backend
from phicore.engine import Engine, Request
from phicore.network.processors import LogitBias, LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.testing.conformance.models import PHI3, Reference, engine_of
from phicore.testing.tiny_models import write_model

TRACED = [name for name in ("numpy", "jax") if name in BACKENDS]
DRAWN = Sampling(temperature=1.5, top_k=40, top_p=0.95, min_p=0.01, repeat_penalty=1.2)
PROMPT = [3, 1, 4, 1, 5]


class Follow(LogitsProcessor):
    """A logits processor that makes each token the last one plus 1, so it needs every token."""

    def __init__(self) -> None:
        self._last = 0

    def start(self, prompt: Any, vocab_size: int) -> dict[str, np.ndarray]:
        return {"last": np.array(prompt[-1], np.int32)}

    @staticmethod
    def apply(ops: Backend, scores: Array, state: Any) -> Array:
        ids = ops.xp.arange(scores.shape[1], dtype=ops.xp.int32)[None, :]
        return ops.xp.where(ids == state["last"][:, None] + 1, scores + 100.0, scores)

    def update(self, token: int) -> dict[str, np.ndarray]:
        return {"last": np.array(token, np.int32)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.F32, tokenizer=False)


@pytest.fixture(params=TRACED)
def engines(request: pytest.FixtureRequest, path: Path) -> Callable[[int], Engine]:
    def make(steps: int) -> Engine:
        ops = make_backend(request.param)
        ops.capabilities = replace(ops.capabilities, steps=steps)
        return engine_of(ops, path)

    return make


def tokens(engine: Engine, sampling: Sampling = DRAWN, **options: Any) -> list[int]:
    options = {"max_tokens": 23, "seed": 7} | options
    return list(engine.generate(Request(PROMPT, sampling, **options)))


@pytest.mark.each_value("limit", "engines")
@pytest.mark.parametrize("limit", [1, 2, 9, 23])
def test_tokens_are_those_of_single_steps(engines: Callable[[int], Engine], limit: int):
    one, many = engines(1), engines(4)
    for sampling in (Sampling(temperature=0), DRAWN):
        assert tokens(many, sampling, max_tokens=limit) == tokens(one, sampling, max_tokens=limit)


def test_computing_ends_with_an_end_token(engines: Callable[[int], Engine]):
    one, many = engines(1), engines(4)
    all_tokens = tokens(one)
    end = all_tokens[9]
    expected = all_tokens[: all_tokens.index(end) + 1]
    assert tokens(many, ends={end, 79}) == expected
    assert tokens(one, ends={end, 79}) == expected


def test_steps_after_an_end_are_not_run(path: Path):
    ops = Reference()
    ops.capabilities = replace(ops.capabilities, steps=8)
    engine = engine_of(ops, path)
    pure = engine.runner.steps.pure
    ran, step = [], pure.step

    def counted(*args: Any, **options: Any) -> Any:
        ran.append(1)
        return step(*args, **options)

    pure.step = counted  # type: ignore[method-assign]
    all_tokens = tokens(engine)
    end = all_tokens[5]
    ran.clear()
    found = tokens(engine, ends={end})
    assert len(ran) == len(found) - 1  # the prompt gives the first token


@pytest.mark.complete
def test_processors_keep_their_state(engines: Callable[[int], Engine]):
    one, many = engines(1), engines(4)
    for make in (lambda: LogitBias({5: 3.0}), Follow):
        processed = [tokens(engine, processors=[make()]) for engine in (one, many)]
        assert processed[0] == processed[1]
    assert tokens(many, processors=[Follow()], max_tokens=6) == [6, 7, 8, 9, 10, 11]


@pytest.mark.complete
def test_a_call_has_no_more_steps_than_are_left(engines: Callable[[int], Engine]):
    """The last call fills the context, so the cache has no slot for a further step."""
    one, many = engines(1), engines(8)
    limit = one.context - len(PROMPT)
    assert tokens(many, max_tokens=limit) == tokens(one, max_tokens=limit)
