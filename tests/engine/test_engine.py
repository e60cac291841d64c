"""Tests of the engine: requests, the outputs of steps, and slots that are freed at the end."""

from __future__ import annotations

import gc
import threading
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.tiny_models import write_tiny
from conftest import make_backend

import phicore
from phicore import ArgumentError, ContextError, PhicoreError
from phicore.backend import Backend
from phicore.engine import Engine, Output, Request
from phicore.network import graph
from phicore.network.processors import LogitBias
from phicore.network.sampling import Sampling
from phicore.testing import tiny_models
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model

GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)
DRAWN = Sampling(temperature=0.9, top_k=30, top_p=0.9, min_p=0.02, repeat_penalty=1.1)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.F32, tokenizer=False)


@pytest.fixture
def engine(ops: Backend, path: Path) -> Engine:
    return engine_of(ops, path)


def run(engine: Engine, request: Request) -> tuple[list[int], str | None]:
    """Run a request; return its tokens and its finish reason."""
    sequence, tokens = engine.add(request), []
    for output in engine.outputs(sequence):
        tokens += output.tokens
        if output.finish_reason is not None:
            return tokens, output.finish_reason
    raise AssertionError("a sequence ends with a reason")


def test_step_reads_the_prompt_then_gives_tokens(engine: Engine):
    sequence = engine.add(Request(PROMPT, GREEDY, max_tokens=3))
    assert not engine._places.reading  # it takes no memory yet
    outputs: list[Output] = []
    while not outputs or outputs[-1].finish_reason is None:
        outputs += engine.step()
    assert outputs[0] == Output(sequence)
    assert [t for o in outputs for t in o.tokens] == sequence.answer
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert (outputs[-1].finish_reason, len(sequence.answer)) == ("length", 3)
    assert engine.is_idle
    assert engine.step() == []


def test_prompt_is_read_by_the_same_functions_for_all_samplings(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A sampler of its own for each chunk was compiled for each size and each kind of sampling."""
    engine = engine_of(make_backend("jax"), path)
    forward, traced = graph.forward, []

    def counted(*args: Any) -> Any:
        traced.append(args[4].shape)
        return forward(*args)

    monkeypatch.setattr(graph, "forward", counted)
    prompt = PROMPT * 8  # chunks of 32 and of 8 tokens, the latter padded to 16
    texts = {}
    for sampling in (GREEDY, DRAWN):
        request = Request(prompt, sampling, max_tokens=2, seed=1)
        texts[sampling], _ = run(engine, request)
    assert traced == [(1, 32), (1, 16), (1, 1), (1, 1)]
    alone = engine_of(make_backend("numpy"), path)
    assert texts == {
        sampling: run(alone, Request(prompt, sampling, max_tokens=2, seed=1))[0]
        for sampling in texts
    }


def test_finish_reasons(engine: Engine):
    tokens, reason = run(engine, Request(PROMPT, GREEDY, max_tokens=8))
    assert (len(tokens), reason) == (8, "length")
    end = tokens[4]
    ended = run(engine, Request(PROMPT, GREEDY, max_tokens=8, ends=frozenset({end})))
    assert ended == (tokens[: tokens.index(end) + 1], "stop")
    prompt = [1 + i % 70 for i in range(engine.context - 2)]
    tokens, reason = run(engine, Request(prompt, GREEDY, max_tokens=8))
    assert (len(tokens), reason) == (2, "context")


def test_sequences_stepped_in_turn_give_the_tokens_of_each_alone(engine: Engine):
    requests = [
        Request(PROMPT, GREEDY, max_tokens=6),
        Request(PROMPT * 5, DRAWN, max_tokens=9, seed=4),
        Request([7], DRAWN, max_tokens=4, seed=4, processors=[LogitBias({5: 2.0})]),
    ]
    alone = [run(engine, request)[0] for request in requests]
    sequences = [engine.add(request) for request in requests]
    while not engine.is_idle:
        engine.step()
    assert [s.answer for s in sequences] == alone


def test_abort_frees_the_slot_and_spares_the_others(engine: Engine):
    first, second = (engine.add(Request(PROMPT, GREEDY, max_tokens=5)) for _ in range(2))
    engine.step()
    engine.abort(first)
    engine.abort(first)  # it has ended already
    while engine.step():
        pass
    assert first.answer == []
    assert len(second.answer) == 5
    assert engine.is_idle


def test_sequence_that_fails_leaves_nothing(engine: Engine):
    wrong = Request(PROMPT, GREEDY, processors=[LogitBias({engine.vocab_size: 1.0})])
    with pytest.raises(ArgumentError, match="token id 80"):
        list(engine.generate(wrong))
    assert engine.step() == []
    assert engine.is_idle


@pytest.mark.parametrize("name", ["insert", "rearrange", "decode", "read", "new_cache"])
def test_backend_that_fails_ends_those_that_it_concerns_and_the_engine_goes_on(
    name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    def no_memory(*args: object, **options: object) -> None:
        raise MemoryError("no memory left")

    request = Request(PROMPT, GREEDY, max_tokens=5)
    expected = list(engine.generate(request))
    first, second = (engine.add(Request(PROMPT, GREEDY, max_tokens=20)) for _ in range(2))
    if name in ("insert", "rearrange"):
        while not first.answer:
            engine.step()
    monkeypatch.setattr(engine.runner, name, no_memory)
    for _ in range(60):
        engine.step()
    assert engine.is_idle
    assert (first.finish_reason, second.finish_reason) == ("error", "error")
    with pytest.raises(MemoryError, match="no memory left"):
        list(engine.outputs(first))
    monkeypatch.undo()
    assert list(engine.generate(request)) == expected


def test_interrupt_in_a_step_leaves_nobody_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    sequences = [engine.add(Request(PROMPT, GREEDY, max_tokens=20)) for _ in range(2)]
    while not sequences[0].answer:
        engine.step()

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "insert", interrupted)

    def run_on() -> None:
        while True:
            engine.step()

    with pytest.raises(KeyboardInterrupt):
        run_on()
    monkeypatch.undo()
    for sequence in sequences:
        with pytest.raises(PhicoreError, match="interrupted"):
            list(engine.outputs(sequence))
    assert engine.is_idle


def test_last_output_that_another_thread_adds_is_not_missed(engine: Engine):
    sequence = engine.add(Request(PROMPT, GREEDY, max_tokens=4))
    outputs = engine.outputs(sequence)
    next(outputs)
    while sequence.finish_reason is None:  # as another thread would
        engine.step()
    late = [sequence.outputs.pop()]
    engine._lock.acquire()

    def add() -> None:
        sequence.outputs.extend(late)
        engine._lock.release()

    threading.Timer(0.2, add).start()
    assert [output.finish_reason for output in outputs][-1] == "length"


def test_prompt_that_does_not_fit_is_refused_at_once(engine: Engine):
    with pytest.raises(ContextError, match=r"^the prompt has 400 tokens and the context holds 400"):
        engine.add(Request([1] * 400))
    with pytest.raises(ArgumentError, match=r"^token id 80: expected 0 to 79$"):
        engine.add(Request([80]))


@pytest.mark.parametrize(
    ("options", "parameter", "expected", "got"),
    [
        ({"prompt_ids": []}, "prompt", None, None),
        ({"max_tokens": 0}, "max_tokens", "1 or more, or -1 (until the context is full)", 0),
        ({"seed": -1}, "seed", "0 to 2**64 - 1", -1),
        ({"stop": [""]}, "stop", "strings of at least one character", [""]),
    ],
    ids=["prompt", "max_tokens", "seed", "stop"],
)
def test_request_says_which_parameter_is_wrong(
    options: dict, parameter: str, expected: str, got: object
):
    with pytest.raises(ArgumentError) as caught:
        Request(**{"prompt_ids": [1]} | options)
    error = caught.value
    assert (error.parameter, error.expected, error.got) == (parameter, expected, got)
    assert error.worded(lambda name: f"--{name}").startswith(f"--{parameter}: expected ")


def test_request_is_frozen_and_keeps_a_random_seed():
    request = Request(np.array([1, 2]), stop="end")
    assert (request.prompt_ids, request.stop) == ((1, 2), ("end",))
    assert request.seed != Request([1]).seed
    with pytest.raises(FrozenInstanceError):
        request.seed = 5  # type: ignore[misc]


def test_generation_that_is_never_begun_leaves_the_engine(tmp_path: Path):
    with phicore.load(write_tiny(tmp_path / "m.gguf"), "numpy") as model:
        generation = model.generate("Hi", max_tokens=2)
        assert len(model.engine.step()) == 1
        del generation
        gc.collect()
        assert model.engine.step() == []


def test_generate_takes_a_request(tmp_path: Path):
    with phicore.load(write_tiny(tmp_path / "m.gguf"), "numpy") as model:
        request = model.request("Hi", max_tokens=4, seed=3, temperature=1.5)
        expected = [p.token_id for p in model.generate("Hi", max_tokens=4, seed=3, temperature=1.5)]
        assert [p.token_id for p in model.generate(request)] == expected
        with pytest.raises(ArgumentError, match=r"^seed: a request has its own options$"):
            model.generate(request, seed=4)
        with pytest.raises(ArgumentError, match=r"^temprature: unknown parameter; the parameters"):
            model.generate("Hi", temprature=1)


def test_rows_on_long_and_short_factors_and_other_slots_share_a_step(ops: Backend, tmp_path: Path):
    """Two rows in one step equal each row in a separate step."""
    [case] = [c for c in tiny_models.cases() if c.name == "phi4_mini"]
    engine = engine_of(ops, case.write(tmp_path / "m.gguf"))
    score = ops.compile(engine.runner.steps.pure.score, donate=(1,))
    rows = np.array([[3, 1, 4, 1], [5, 9, 2, 6]], np.int32)
    is_long, first = (False, True), np.array([0, 13], np.int32)
    tables = engine.runner.tables.until(30, is_long=True)
    starts = np.array([engine.runner.tables.start(each) for each in is_long], np.int32)
    positions = first[:, None] + np.arange(4, dtype=np.int32)

    def logits(chosen: slice) -> np.ndarray:
        count, c = len(rows[chosen]), engine.runner.config
        cache = [
            ops.new_cache(count, c.num_key_value_heads, 256, c.head_dim)
            for _ in range(c.num_hidden_layers)
        ]
        place = {"first": ops.asarray(first[chosen]), "rope_start": ops.asarray(starts[chosen])}
        inputs = ops.asarray(rows[chosen]), ops.asarray(positions[chosen])
        return ops.to_numpy(score(engine.runner.params, cache, tables, place, *inputs)[1])

    both = logits(slice(None))
    for row in range(2):
        alone = logits(slice(row, row + 1))[0]
        assert np.abs(both[row] - alone).max() < 1e-4 * np.abs(alone).max()
    short = engine.logits(rows[0].tolist())
    assert np.abs(both[0] - short).max() < 1e-4 * np.abs(short).max()
