"""Sequences share batches though they have other logits processors, and no text changes by that."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.tiny_models import write_tiny
from conftest import BACKENDS, make_backend
from engine.test_speculation import Eager, alone, assert_same, together
from hypothesis import given
from hypothesis import strategies as st

import phicore
from phicore import Model
from phicore.backend import Backend
from phicore.engine import Engine, Request
from phicore.engine.drafts import NGrams
from phicore.engine.forced import Forced
from phicore.engine.rows import Rows
from phicore.engine.scheduler import Scheduler
from phicore.engine.sharing import hosts
from phicore.grammar import AllowedTokens
from phicore.network.processors import (
    AnswerPenalty,
    Kinds,
    LogitBias,
    LogitsProcessor,
    has_neutral,
)
from phicore.network.sampling import Sampling
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model

VOCABULARY = 80
SHARED = [LogitBias, AnswerPenalty, AllowedTokens]


class Bans(LogitBias):
    """A class of its own, which shares what a bias is."""


class Doubles(LogitBias):
    """Changes what a bias does, so a bias of zeros is not neutral."""

    @classmethod
    def apply(cls, ops: Backend, logits: Any, state: Any) -> Any:
        return 2 * logits + state["bias"]


# ---- who shares ----------------------------------------------------------------------------------

KINDS = st.lists(st.sampled_from([LogitBias, AnswerPenalty, AllowedTokens, Bans]), max_size=4)


@given(st.lists(KINDS.map(tuple), min_size=1, max_size=6), st.sets(st.sampled_from(SHARED)))
def test_everybody_runs_with_all_of_their_own_processors(present: list[Kinds], neutral: set[Any]):
    found = hosts(present, lambda kind: kind in neutral)
    assert found.keys() == set(present)
    for kinds, host in found.items():
        assert found[host] == host  # nobody is sent on
        left = iter(host)
        assert all(kind in left for kind in kinds)  # in the same order
        assert kinds == host or all(kind in neutral for kind in set(host) - set(kinds))
        assert kinds == host or len(set(host)) == len(host)
    assert hosts(reversed(present), lambda kind: kind in neutral) == found  # whoever came first


def test_plain_rows_join_those_with_a_processor():
    bias, both = (LogitBias,), (LogitBias, AllowedTokens)
    assert hosts([(), bias, both], has_neutral) == {(): both, bias: both, both: both}
    twice = (LogitBias, LogitBias)
    assert hosts([(), twice], has_neutral) == {(): (), twice: twice}
    assert hosts([(), (Doubles,)], has_neutral) == {(): (), (Doubles,): (Doubles,)}


@pytest.mark.parametrize("kind", [*SHARED, Bans])
def test_neutral_state_changes_no_score(kind: type[LogitsProcessor], ops: Backend):
    assert has_neutral(kind)
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 9, (3, VOCABULARY)).astype(np.float32)
    scores[1, :7] = -np.inf
    neutral = kind.neutral(VOCABULARY)
    assert neutral is not None
    state: Mapping[str, Any] = {n: ops.asarray(np.stack([a] * 3)) for n, a in neutral.items()}
    for token in ([1, 2, 3], [1, 1, 79]):
        found = ops.to_numpy(kind.apply(ops, ops.asarray(scores), state))
        assert found.tobytes() == scores.tobytes()
        state = kind.advance(ops, state, ops.asarray(np.array(token, np.int32)[:, None]))


def test_neutral_state_is_like_any_other(reference: Model):
    constrained = reference.request("Hello", regex="[a-z]+").processors[0]
    for processor in (LogitBias({3: 1.0}), AnswerPenalty(frequency=1.0), constrained):
        neutral = processor.neutral(reference.vocab_size)
        state = processor.start([1], reference.vocab_size)
        assert neutral is not None
        assert {n: (a.shape, a.dtype) for n, a in neutral.items()} == {
            n: (a.shape, a.dtype) for n, a in state.items()
        }
    assert not has_neutral(Doubles)
    assert not has_neutral(LogitsProcessor)


# ---- texts ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Iterator[Model]:
    with phicore.load(tiny, "numpy", max_sequences=8) as model:
        yield model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.F32, tokenizer=False)


def requests(model: Model) -> list[Request]:
    """Return plain requests, and constrained ones that come and go beside them."""
    options: list[dict[str, Any]] = [
        {"temperature": 1.1, "repeat_penalty": 1.2},
        {"regex": "[a-z]{3,9}", "temperature": 1.5},
        {"temperature": 0, "max_tokens": 40},
        {"temperature": 0.9, "processors": ["frequency-penalty=0.4"]},
        {"regex": "(yes|no)+", "temperature": 0, "max_tokens": 20},
        {"temperature": 1.3, "max_tokens": 35},
    ]
    return [
        model.request("Hello", **{"seed": seed, "max_tokens": 25, "logprobs": 2, **each})
        for seed, each in enumerate(options)
    ]


def calls_of(engine: Engine, made: list[Request], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run requests that are read already; return the rows of each decode call."""
    sequences = [engine.add(request) for request in made]
    while not all(sequence.answer for sequence in sequences):
        engine.step()
    found: list[int] = []
    decode = engine.runner.decode

    def counted(rows: Rows, count: int) -> Any:
        found.append(len(rows.live))
        return decode(rows, count)

    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "decode", counted)
        while not engine.is_idle:
            found.append(0)  # a step of the engine begins
            engine.step()
    return found


def test_text_is_the_same_beside_constrained_rows(tiny: Path, ops: Backend, backend_name: str):
    with phicore.load(tiny, backend_name, max_sequences=8) as model:
        engine, made = model.engine, requests(model)
        expected = alone(engine, made)
        is_exact = backend_name == "jax"
        for seed in (None, 1):
            assert_same(together(engine, made, seed), expected, exact=is_exact)


def test_constrained_row_among_plain_ones_costs_no_second_step(
    reference: Model, monkeypatch: pytest.MonkeyPatch
):
    plain = [
        reference.request("Hello", seed=seed, max_tokens=40, ignore_eos=True) for seed in range(7)
    ]
    one = reference.request("Hello", seed=9, regex="[a-z]{90}", max_tokens=20)
    expected = alone(reference.engine, [*plain, one])
    calls = calls_of(reference.engine, [*plain, one], monkeypatch)
    assert max(calls) == 8
    steps = "".join("s" if live == 0 else "c" for live in calls)
    assert "cc" not in steps
    assert together(reference.engine, [*plain, one]) == expected


@pytest.mark.parametrize("most", [2, 3, 8])
def test_text_is_the_same_with_guesses_beside_plain_rows(reference: Model, most: int):
    engine, made = reference.engine, requests(reference) * 2
    expected = alone(engine, made)
    engine.scheduler, engine.drafter = Eager(max_sequences=most), Forced(NGrams())
    try:
        for seed in (None, 3, 4):
            assert_same(together(engine, made, seed), expected, exact=False)
    finally:
        engine.scheduler, engine.drafter = Scheduler(max_sequences=8), None


PROCESSORS: list[Callable[[], list[LogitsProcessor]]] = [
    list,
    lambda: [LogitBias({5: 4.0, 7: -1e9})],
    lambda: [AnswerPenalty(frequency=0.7, presence=0.3)],
    lambda: [LogitBias({5: 4.0}), AnswerPenalty(frequency=0.7)],
    lambda: [AnswerPenalty(frequency=0.7), LogitBias({5: 4.0})],
    lambda: [LogitBias({9: 1.0}), LogitBias({5: 4.0})],
    lambda: [Bans({5: -1e9}), LogitBias({6: -1e9})],
    lambda: [Doubles({5: 1.0})],
]


def crowd(count: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    sampling = [Sampling(temperature=0.0), Sampling(temperature=1.1, repeat_penalty=1.1)]
    return [
        Request(
            [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))],
            rng.choice(sampling),
            max_tokens=rng.randint(1, 30),
            seed=number,
            processors=rng.choice(PROCESSORS)(),
        )
        for number in range(count)
    ]


@pytest.mark.each_value("most", "seed")
@pytest.mark.parametrize("most", [3, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_batches_widen_narrow_and_merge(path: Path, most: int, seed: int):
    engine, made = engine_of(make_backend("numpy"), path), crowd(24, seed)
    expected = alone(engine, made)
    engine.scheduler = Scheduler(max_sequences=most)
    assert together(engine, made, seed) == expected
    assert together(engine, made) == expected


def test_batches_become_one_and_narrow_again(path: Path):
    engine = engine_of(make_backend("numpy"), path)
    kinds = [[LogitBias({5: 4.0})], [LogitBias({6: 4.0})], [AnswerPenalty(frequency=0.5)], []]
    made = [
        Request([3, 1, number], max_tokens=40, seed=number, processors=processors)
        for number, processors in enumerate(kinds)
    ]
    both = Request([5], max_tokens=5, processors=[LogitBias({3: 1.0}), AnswerPenalty()], seed=8)
    expected = alone(engine, [*made, both])
    sequences = [engine.add(request) for request in made]
    seen = []
    while not engine.is_idle:
        engine.step()
        if sequences[0].computed == 14 and len(sequences) == 4:
            sequences.append(engine.add(both))
        seen.append([rows.kinds for rows in engine._places.batches])
    assert [s.answer for s in sequences] == [answer[0] for answer in expected]
    apart = [(LogitBias,), (AnswerPenalty,)]
    assert [sorted(k[0].__name__ for k in each) for each in seen if len(each) == 2]
    assert [(LogitBias, AnswerPenalty)] in seen
    first = seen.index([(LogitBias, AnswerPenalty)])
    assert any(set(each) == set(apart) for each in seen[:first])
    # What runs together stays together, with the processors that somebody needs.
    assert seen.count([(LogitBias, AnswerPenalty)]) > 2 * both.max_tokens
    assert seen[-2] == [()]


def test_calls_of_several_steps_are_not_given_up(path: Path):
    """A processor that needs each token would cost the plain rows their long calls."""
    ops = make_backend("numpy")
    ops.capabilities = replace(ops.capabilities, steps=4)
    engine = engine_of(ops, path)

    class Waits(LogitBias):
        def update(self, token: int) -> dict[str, np.ndarray]:
            return {}

    assert has_neutral(Waits)
    made = [
        Request([3], max_tokens=21, seed=1),
        Request([4], max_tokens=21, seed=2, processors=[Waits({5: 1.0})]),
    ]
    expected = alone(engine, made)
    sequences = [engine.add(request) for request in made]
    while not engine.is_idle:
        engine.step()
        assert all(len(rows.live) == 1 for rows in engine._places.batches)
    assert [s.answer for s in sequences] == [answer[0] for answer in expected]


@pytest.mark.complete
def test_nothing_is_compiled_once_the_sizes_are_warm(path: Path):
    if "jax" not in BACKENDS:
        pytest.skip("needs a backend that compiles: install phicore-jax")
    engine = engine_of(make_backend("jax"), path)
    engine.scheduler = Scheduler(max_sequences=4)
    engine.warm_up([Sampling(), Sampling(temperature=0)], processors=[LogitBias({})])
    compiled: list[str] = []
    engine.runner.steps.progress = lambda what, done, total: compiled.append(what)
    rng = random.Random(8)
    made = [
        Request(
            [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))],
            rng.choice([Sampling(), Sampling(temperature=0)]),
            max_tokens=rng.randint(1, 12),
            seed=number,
            processors=rng.choice([[], [], [LogitBias({5: 4.0})]]),
        )
        for number in range(150)
    ]
    together(engine, made, seed=1)
    assert not compiled


# ---- faults that the tests above must see --------------------------------------------------------


def forbids_a_half(cls: Any, vocab_size: int) -> dict[str, np.ndarray]:
    return {"mask": np.full(-(-vocab_size // 8), 0b1111, np.uint8)}


def state_of_another_row(self: Rows, kinds: Kinds, vocab_size: int) -> None:
    CHANGE(self, kinds, vocab_size)
    ops = self.cache.ops
    for number, state in enumerate(self.states):
        other = {name: np.roll(ops.to_numpy(array), 1, axis=0) for name, array in state.items()}
        self.states[number] = {name: ops.asarray(array) for name, array in other.items()}


CHANGE = Rows.change_kinds


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (AllowedTokens, "neutral", classmethod(forbids_a_half)),
        (Rows, "change_kinds", state_of_another_row),
    ],
    ids=["a neutral state that forbids", "another row's state"],
)
def test_fault_is_seen(
    where: Any, name: str, fault: Any, reference: Model, monkeypatch: pytest.MonkeyPatch
):
    engine, made = reference.engine, requests(reference)
    expected = [answer[:2] for answer in alone(engine, made)]
    assert [answer[:2] for answer in together(engine, made, 1)] == expected
    monkeypatch.setattr(where, name, fault)
    sequences = [engine.add(request) for request in made]
    while not engine.is_idle:
        engine.step()
    assert [(s.answer, s.finish_reason) for s in sequences] != expected
