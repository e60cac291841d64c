"""Guesses of the tokens of constrained answers: checked several at a time, they change no text.

Each test runs requests on an engine without a drafter, then on one with it, and wants the same
tokens. On the kernels of JAX the log probabilities of an answer alone are the same to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api.tiny_models import write_tiny
from conftest import ALL_BACKENDS, make_backend
from engine.test_speculation import Always, Counted, Eager, Told, alone, assert_same, together, told
from hypothesis import given, settings
from hypothesis import strategies as st

import phicore
from phicore import Model
from phicore.backend import Backend
from phicore.engine import Engine, Request
from phicore.engine import Sequence as Running
from phicore.engine.drafts import Draft, NGrams
from phicore.engine.forced import Forced
from phicore.engine.rows import Ahead, Rows
from phicore.engine.scheduler import Scheduler
from phicore.grammar import AllowedTokens
from phicore.network.processors import LogitsProcessor
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model

PERSON = {
    "type": "object",
    "properties": {
        "first_name": {"enum": ["ann", "bob"]},
        "occupation": {"enum": ["baker", "miner"]},
        "age_in_years": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["first_name", "occupation", "age_in_years"],
}
CONSTRAINTS: list[dict[str, Any]] = [
    {"json_schema": PERSON},
    {"regex": "(ab|cd){4,20}-the end"},
    {"grammar": 'root ::= word ("+" word)*\nword ::= "plus" | "minus" | [0-9]'},
]


class FoundOrForced(Counted, Forced):
    """What `speculation=True` takes, with a count."""

    def __init__(self) -> None:
        super().__init__(NGrams())

    def checked(self, sequence: Running, drafted: int, accepted: int) -> None:
        super().checked(sequence, drafted, accepted)
        Forced.checked(self, sequence, drafted, accepted)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf")


@pytest.fixture(scope="module")
def model(tiny: Path, backend_name: str, ops: object) -> Iterator[Model]:
    with phicore.load(tiny, backend_name, max_sequences=8) as model:
        yield model


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Iterator[Model]:
    with phicore.load(tiny, "numpy", max_sequences=8) as model:
        yield model


def requests(model: Model, **options: Any) -> list[Request]:
    """Return constrained requests, greedy and drawn, with penalties, and requests beside them."""
    penalty = {"repeat_penalty": 1.2, "processors": ["frequency-penalty=0.5"]}
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.4, "repeat_penalty": 1.3},
    ]
    made = [
        model.request("Hello Hello Hello", max_tokens=60, seed=n, **each, **setting, **options)
        for n, each in enumerate(CONSTRAINTS)
        for setting in settings
    ]
    free: list[dict[str, Any]] = [{"temperature": 1.5}, {"temperature": 0}, {**penalty, "seed": 3}]
    return [
        *made,
        model.request("Hello", max_tokens=30, regex="[a-z ]+", **penalty, **options),
        *(model.request("Hello Hello", max_tokens=30, **each, **options) for each in free),
    ]


DRAFTERS: dict[str, Callable[[dict[Any, list[int]]], Counted]] = {
    "right": lambda answers: Told(answers, 1.0),
    "random": lambda answers: Told(answers, 0.7),
    "forced": lambda answers: FoundOrForced(),
}


@pytest.mark.each_value("drafter", "backend_name")
@pytest.mark.complete_where(backend_name="jax")
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_text_is_the_same_with_guesses(model: Model, drafter: str, backend_name: str):
    engine, made = model.engine, requests(model, logprobs=2)
    is_exact, is_compiled = backend_name == "jax", engine.runner.ops.capabilities.compiles
    if is_compiled:  # each combination of classes takes seconds
        made = [made[0], made[1], made[7]]
    expected = alone(engine, made)
    assert len(told(made, expected)) == len(made)  # the drafters tell requests by their seeds
    counted = DRAFTERS[drafter](told(made, expected))
    engine.drafter, engine.scheduler = counted, Eager(max_sequences=2 if is_compiled else 8)
    try:
        assert_same([together(engine, [r])[0] for r in made], expected, exact=is_exact)
        for seed in (None, 1):
            before = counted.accepted
            assert before > 5 * len(made)
            assert_same(together(engine, made, seed), expected, exact=False)
            assert counted.accepted > before
    finally:
        engine.drafter = None


def test_stop_string_inside_of_forced_tokens_ends_the_text(tiny: Path, reference: Model):
    request = reference.request("Hello", json_schema=PERSON, seed=1, max_tokens=90)
    text = reference.generate(request).text()
    assert json.loads(text)
    stop = text[text.index("pation") :][:9]
    with phicore.load(tiny, "numpy", speculation=True) as quick:
        quick.engine.scheduler = Always()
        generation = quick.generate(replace(request, stop=stop))
        assert generation.text() == text[: text.index(stop)]
        assert generation.timings.accepted_tokens > 0


def steps_of(engine: Engine, request: Request, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return in how many decode steps an answer is made."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            return function(*args, **options)

        return call

    with monkeypatch.context() as patched:
        for name in ("decode", "verify"):
            patched.setattr(engine.runner, name, counted(getattr(engine.runner, name)))
        list(engine.generate(request))
    return count


def test_json_takes_half_of_the_steps(reference: Model, monkeypatch: pytest.MonkeyPatch):
    made = [
        reference.request("Hello", json_schema=PERSON, seed=seed, temperature=0.5, max_tokens=90)
        for seed in range(4)
    ]
    engine = reference.engine
    engine.drafter = None
    plain = [steps_of(engine, request, monkeypatch) for request in made]
    engine.drafter, engine.scheduler = Forced(Nothing()), Always()
    try:
        quick = [steps_of(engine, request, monkeypatch) for request in made]
    finally:
        engine.drafter, engine.scheduler = None, Scheduler(max_sequences=8)
    assert 2 * sum(quick) < sum(plain)


class Nothing(NGrams):
    """Guesses nothing."""

    def draft(self, sequences: Sequence[Running], most: int) -> list[Draft]:
        return [Draft()] * len(sequences)


# ---- what a processor tells ahead ----------------------------------------------------------------


def started(model: Model, **constraint: Any) -> AllowedTokens:
    """Return a processor before the first token of an answer."""
    request = model.request("Hello", **constraint)
    processor = copy(request.processors[-1])
    assert isinstance(processor, AllowedTokens)
    processor.start(request.prompt_ids, model.vocab_size)
    return processor


def allowed(state: Any) -> list[int]:
    """Return the tokens that a state allows; none after an end."""
    if not state:
        return []
    return np.flatnonzero(np.unpackbits(state["mask"], bitorder="little")).tolist()


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda each: next(iter(each)))
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_is_told_ahead_is_what_comes(
    reference: Model, constraint: dict[str, Any], data: st.DataObject
):
    """`ahead` is asked before each token of an answer, about good and bad guesses."""
    asked, plain = started(reference, **constraint), started(reference, **constraint)
    state = plain.start([], reference.vocab_size)
    for _ in range(12):
        follower, now = copy(plain), state
        follower._matcher = plain._matcher.deep_copy()
        guess: list[int] = []
        expected: list[list[int]] = []  # what is allowed after each token of the guess
        is_good = True
        for _ in range(data.draw(st.integers(0, 5))):
            is_bad = data.draw(st.integers(0, 9)) == 0
            tokens = st.integers(-2, 10**6) if is_bad else st.sampled_from(allowed(now))
            guess.append(data.draw(tokens))
            is_good = is_good and guess[-1] in allowed(now)
            if is_good:
                state_after = follower.update(guess[-1])
                expected.append(allowed(state_after))
                if not state_after:
                    break  # the answer has ended
                now = state_after
        assert [allowed(one) for one in asked.ahead(guess)] == expected
        forced = list(asked.forced())
        assert len(asked.ahead(forced)) == len(forced)
        asked.ahead(guess)
        token = data.draw(st.sampled_from([*guess[: min(1, len(expected))], *allowed(state)]))
        if token in reference.tokenizer.end_token_ids:
            return
        new = asked.update(token)
        state = plain.update(token)
        assert allowed(new) == allowed(state)


class OnBoth(LogitsProcessor):
    """Needs each token on the host, and has a state of which the device computes a part.

    The token before the last is forbidden by the host, and as many tokens as were generated are
    made more likely by the device.
    """

    def start(self, prompt: Any, vocab_size: int) -> dict[str, np.ndarray]:
        self._size, self._last = vocab_size, -1
        return {**self._state(), "count": np.zeros(1, np.int32)}

    def _state(self) -> dict[str, np.ndarray]:
        return {"bias": np.where(np.arange(self._size) == self._last, -1e9, 0).astype(np.float32)}

    @classmethod
    def apply(cls, ops: Backend, logits: Any, state: Any) -> Any:
        xp = ops.xp
        places = xp.arange(logits.shape[1], dtype=xp.int32)[None, :]
        liked = xp.astype(places < state["count"], xp.float32)
        return logits + state["bias"] + liked

    @classmethod
    def advance(cls, ops: Backend, state: Any, token: Any) -> Any:
        return {**state, "count": state["count"] + 3}

    def update(self, token: int) -> dict[str, np.ndarray]:
        self._last = token
        return self._state()

    def ahead(self, tokens: Sequence[int]) -> list[dict[str, np.ndarray]]:
        other, found = copy(self), []
        for token in tokens:
            if token == other._last:
                break
            found.append(other.update(token))
        return found


class Fails(OnBoth):
    """Cannot say what comes after a third token."""

    def ahead(self, tokens: Sequence[int]) -> list[dict[str, np.ndarray]]:
        if self._last == -1:
            return super().ahead(tokens)
        raise ZeroDivisionError("no more")


class Overrides(OnBoth):
    """Overrides `update` alone, so nothing is known ahead."""

    def update(self, token: int) -> dict[str, np.ndarray]:
        return super().update(token)


class WrongShape(OnBoth):
    def ahead(self, tokens: Sequence[int]) -> list[dict[str, np.ndarray]]:
        return [{"bias": np.zeros(3, np.float32)} for _ in tokens]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.F32, tokenizer=False)


def mixed(count: int = 4) -> list[Request]:
    return [
        Request([seed, 3, 1, 4], sampling, max_tokens=24, seed=seed, processors=[OnBoth()])
        for seed in range(count)
        for sampling in [
            phicore.Sampling(temperature=0.0),
            phicore.Sampling(temperature=1.2, repeat_penalty=1.1),
        ]
    ]


@pytest.mark.each_value("chance", "backend_name")
@pytest.mark.complete_where(backend_name="jax")
@pytest.mark.parametrize("chance", [1.0, 0.7])
def test_states_of_host_and_device_are_those_of_each_token(ops: Backend, path: Path, chance: float):
    engine, made = engine_of(ops, path), mixed(2)
    expected = alone(engine, made)
    engine.scheduler, engine.drafter = Eager(), Told(told(made, expected), chance)
    assert together(engine, made) == expected
    assert engine.drafter.accepted > 10


def test_functions_of_the_standard_are_enough(path: Path):
    if "array-api-strict" not in ALL_BACKENDS:
        pytest.skip("needs the backend array-api-strict")
    engine = engine_of(make_backend("array-api-strict"), path)
    made = [replace(request, max_tokens=9) for request in mixed(1)]
    expected = alone(engine, made)
    engine.scheduler, engine.drafter = Eager(), Told(told(made, expected), 0.8)
    assert together(engine, made) == expected
    assert engine.drafter.accepted > 5


def test_processor_that_fails_ahead_ends_its_sequence_alone(path: Path):
    engine = engine_of(make_backend("numpy"), path)
    made = mixed(1)
    expected = alone(engine, made)
    for kind, error in ((Fails, "no more"), (WrongShape, r"WrongShape\.ahead: bias: expected")):
        failing = [replace(made[0], processors=[kind()]), *made]
        engine.scheduler = Eager()
        engine.drafter = Told(told([*made, failing[0]], [*expected, expected[0]]), 1.0)
        sequences = [engine.add(request) for request in failing]
        with pytest.raises((ZeroDivisionError, phicore.PhicoreError), match=error):
            list(engine.outputs(sequences[0]))
        while not engine.is_idle:
            engine.step()
        assert [s.answer for s in sequences[1:]] == [answer[0] for answer in expected]


def test_subclass_that_overrides_update_alone_is_not_checked(path: Path):
    assert OnBoth().looks_ahead
    assert not Overrides().looks_ahead
    engine = engine_of(make_backend("numpy"), path)
    request = replace(mixed(1)[0], processors=[Overrides()])
    expected = alone(engine, [request])
    engine.scheduler, engine.drafter = Eager(), Told(told([request], expected), 1.0)
    assert together(engine, [request]) == expected
    assert engine.drafter.drafted == 0


# ---- faults that the tests above must see --------------------------------------------------------


def state_of_the_first_token(self: Rows, told: Any, count: int) -> Ahead:
    """No state is told, so each token of a draft sees what the first one sees."""
    return AHEAD(self, {}, count)


def state_of_the_token_before(self: Rows, told: Any, count: int) -> Ahead:
    late = {s: [[{}] * len(self.kinds), *states[:-1]] for s, states in told.items()}
    return AHEAD(self, late, count)


def first_tokens_alone(self: Rows, sequence: Running, tokens: Sequence[int]) -> None:
    TELL(self, sequence, tokens[:1])


AHEAD, TELL = Rows.ahead, Rows.tell


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("ahead", state_of_the_first_token),
        ("ahead", state_of_the_token_before),
        ("tell", first_tokens_alone),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_fault_is_seen(reference: Model, name: str, fault: Any, monkeypatch: pytest.MonkeyPatch):
    engine, made = reference.engine, requests(reference)[:6]
    expected = alone(engine, made)
    engine.drafter, engine.scheduler = FoundOrForced(), Eager(max_sequences=8)
    try:
        assert [together(engine, [r])[0] for r in made] == expected
        monkeypatch.setattr(Rows, name, fault)
        found = []
        for request in made:
            sequence = engine.add(request)
            while not engine.is_idle:
                engine.step()
            found.append(sequence.answer)
        assert found != [answer[0] for answer in expected]
    finally:
        engine.drafter, engine.scheduler = None, Scheduler(max_sequences=8)
