"""The network runs while a processor on the host learns of the last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_backend

from phicore.backend import Array, Backend
from phicore.engine import Request
from phicore.engine.runner import Runner
from phicore.network.processors import LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model

SAMPLINGS = [
    Sampling(temperature=0.0, repeat_penalty=1.2),
    Sampling(temperature=1.0, top_k=30),
]


class NotTwice(LogitsProcessor):
    """Forbids the last token, which the host tells it."""

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def start(self, prompt: Sequence[int], vocab_size: int) -> Mapping[str, np.ndarray]:
        return {"last": np.array(prompt[-1], np.int32)}

    def update(self, token: int) -> Mapping[str, np.ndarray]:
        self._log.append("told")
        return {"last": np.array(token, np.int32)}

    @classmethod
    def apply(cls, ops: Backend, logits: Array, state: Mapping[str, Array]) -> Array:
        ids = ops.xp.arange(logits.shape[1], dtype=ops.xp.int32)[None, :]
        return ops.xp.where(ids == state["last"][:, None], -float("inf"), logits)


class OnDevice(NotTwice):
    """Forbids the last token, which the device tells it."""

    update = LogitsProcessor.update

    @classmethod
    def advance(cls, ops: Backend, state: Mapping[str, Array], token: Array) -> Mapping[str, Array]:
        return {"last": token[:, 0]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.gguf", PHI3, Type.Q8_0, tokenizer=False)


@pytest.mark.each_value("sampling", "backend_name")
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn"])
def test_text_is_that_of_the_same_processor_on_the_device(
    backend_name: str, path: Path, sampling: Sampling
):
    engine = engine_of(make_backend(backend_name), path)

    def texts(kind: type[NotTwice]) -> list[list[int]]:
        requests = [
            Request([3, 5, seed], sampling, max_tokens=length, seed=seed, processors=[kind([])])
            for seed, length in ((1, 14), (2, 5), (3, 9))
        ]
        alone = [list(engine.generate(request)) for request in requests]
        sequences = [engine.add(request) for request in requests]
        crowd = [[t for o in engine.outputs(s) for t in o.tokens] for s in sequences]
        assert crowd == alone
        return alone

    assert texts(NotTwice) == texts(OnDevice)


def test_next_call_begins_before_a_processor_knows_the_token(
    backend_name: str, path: Path, monkeypatch: pytest.MonkeyPatch
):
    ops = make_backend(backend_name)
    if not ops.capabilities.asynchronous:
        pytest.skip("calls of this backend return when they are complete")
    log: list[str] = []
    run = Runner.look_ahead

    def logged(self: Runner, rows: Any) -> None:
        if rows.scores is None:
            log.append("begun")
        run(self, rows)

    monkeypatch.setattr(Runner, "look_ahead", logged)
    engine = engine_of(ops, path)
    list(engine.generate(Request([3, 5], SAMPLINGS[0], max_tokens=6, processors=[NotTwice(log)])))
    # The prompt gives the first token, the first call the second.
    assert log == ["told", *["begun", "begun", "told"], *["begun", "told"] * 3, "told"]
