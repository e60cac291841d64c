"""Speculation: drafts that are right, wrong or anything else never change a text.

Each test runs requests on an engine without a drafter, then on one with it, and wants the same
tokens. The schedulers of the tests check drafts whenever there are some, with steps of any size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, make_backend

from phicore.backend import Backend
from phicore.engine import Engine, Request
from phicore.engine import Sequence as Running
from phicore.engine.drafts import Draft, Drafter, NGrams, accepted
from phicore.engine.rows import Rows
from phicore.engine.runner import Runner
from phicore.engine.scheduler import Scheduler
from phicore.engine.steps import Steps
from phicore.network import sampler
from phicore.network.processors import AnswerPenalty, LogitBias, LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.testing import tiny_models
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model

VOCABULARY = 80
GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=0.9, top_k=30, top_p=0.9, min_p=0.02, repeat_penalty=1.2)


class Eager(Scheduler):
    """Checks drafts whenever there are some, with a step of a random size."""

    def __init__(self, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._random = random.Random(seed)

    def step_wanted(self, rows: int, most: int, drafts: Sequence[Draft]) -> int:
        sizes = [size for size in self.step_sizes(rows) if size <= most]
        has_some = any(draft.tokens for draft in drafts)
        return self._random.choice(sizes) if sizes and has_some else 1


class Told(Drafter):
    """Knows the answers, and is right about each token with a given chance."""

    def __init__(self, answers: dict[Any, list[int]], chance: float) -> None:
        self.answers, self.chance = answers, chance
        self.random = random.Random(7)
        self.drafted = self.accepted = 0

    def draft(self, sequences: Sequence[Running], most: int) -> list[Draft]:
        return [self._draft(sequence, most) for sequence in sequences]

    def _draft(self, sequence: Running, most: int) -> Draft:
        answer = self.answers[key(sequence.request)][len(sequence.answer) :][:most]
        length = self.random.randint(1, most) if 0 < self.chance < 1 else most
        answer = [*answer, *[3] * most][:length]
        is_right = [self.random.random() < self.chance for _ in answer]
        return Draft(
            tuple(
                t if right else (t + self.random.randint(1, VOCABULARY - 1)) % VOCABULARY
                for t, right in zip(answer, is_right, strict=True)
            ),
            self.chance,
        )

    def checked(self, sequence: Running, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted


DRAFTERS: dict[str, Callable[[dict[Any, list[int]]], Drafter]] = {
    "right": lambda answers: Told(answers, 1.0),
    "wrong": lambda answers: Told(answers, 0.0),
    "random": lambda answers: Told(answers, 0.7),
    "n-grams": lambda answers: NGrams(),
}


def key(request: Request) -> Any:
    return request.prompt_ids, request.seed, request.max_tokens, request.sampling


PROCESSORS: list[Callable[[], list[LogitsProcessor]]] = [
    list,
    list,
    lambda: [LogitBias({5: 4.0, 7: -1e9})],
    lambda: [AnswerPenalty(frequency=0.7, presence=0.3)],
    lambda: [AnswerPenalty(frequency=0.2), LogitBias({9: 3.0})],
]


def requests(count: int, seed: int, longest: int) -> list[Request]:
    """Return random requests. Their prompts repeat themselves, so that n-grams are found."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        sampling = Sampling(temperature=0.0, repeat_penalty=rng.choice([1.0, 1.3]))
        if rng.random() < 0.6:
            sampling = Sampling(
                temperature=rng.choice([0.3, 0.7, 1.3]),
                top_k=rng.choice([0, 20]),
                top_p=rng.choice([1.0, 0.9]),
                min_p=rng.choice([0.0, 0.02]),
                repeat_penalty=rng.choice([1.0, 1.2]),
                repeat_last_n=rng.choice([-1, 16, 64]),
            )
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]
        prompt += prompt[: longest - len(prompt)]
        found.append(
            Request(
                prompt,
                sampling,
                max_tokens=rng.randint(1, longest),
                seed=rng.randrange(2**64),
                ends=frozenset(rng.sample(range(VOCABULARY), rng.randint(0, 2))),
                processors=rng.choice(PROCESSORS)(),
                logprobs=rng.choice([None, None, None, 3]),
            )
        )
    return found


Answer = tuple[list[int], str | None, list[Any]]


def together(engine: Engine, made: list[Request], seed: int | None = None) -> list[Answer]:
    """Run requests together; with a seed, they come at random times. Return what they got."""
    rng = random.Random(seed)
    last = 0 if seed is None else 4 * len(made)
    waiting = sorted((rng.randint(0, last), number) for number in range(len(made)))
    found: dict[int, Running] = {}
    step = 0
    while waiting or not engine.is_idle:
        while waiting and waiting[0][0] <= step:
            number = waiting.pop(0)[1]
            found[number] = engine.add(made[number])
        engine.step()
        step += 1
    answers = []
    for number in range(len(made)):
        outputs = found[number].outputs
        assert not any(output.error for output in outputs), [o.error for o in outputs]
        likely = [one for output in outputs for one in output.logprobs]
        assert [t for output in outputs for t in output.tokens] == found[number].answer
        answers.append((found[number].answer, found[number].finish_reason, likely))
    return answers


def alone(engine: Engine, made: list[Request]) -> list[Answer]:
    engine.drafter = None
    return [together(engine, [request])[0] for request in made]


def told(made: list[Request], answers: list[Answer]) -> dict[Any, list[int]]:
    return {key(r): a[0] for r, a in zip(made, answers, strict=True)}


def assert_same(found: list[Answer], expected: list[Answer], *, exact: bool) -> None:
    """Compare answers; log probabilities to the last bit only where the kernels promise that."""
    assert [answer[:2] for answer in found] == [answer[:2] for answer in expected]
    for one, other in zip(found, expected, strict=True):
        if exact:
            assert one[2] == other[2]
            continue
        assert [p.token for p in one[2]] == [p.token for p in other[2]]
        figures = [[p.logprob for p in likely] for likely in (one[2], other[2])]
        assert np.allclose(*figures, rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.Q4_K, tokenizer=False)


CASES = {case.name: case for case in [*tiny_models.cases(), tiny_models.windowed()]}


@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.complete)])
@pytest.mark.each_value("drafter", "backend_name")
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_text_is_the_same_with_drafts(
    drafter: str, count: int, ops: Backend, backend_name: str, path: Path
):
    engine = engine_of(ops, path)
    made = requests(count, seed=count, longest=24)
    expected = alone(engine, made)
    engine.scheduler = Eager()
    engine.drafter = DRAFTERS[drafter](told(made, expected))
    is_exact = backend_name == "jax"
    found = [together(engine, [request])[0] for request in made]
    assert_same(found, expected, exact=is_exact)
    for seed in (None, 1):
        assert_same(together(engine, made, seed), expected, exact=is_exact)
    if isinstance(engine.drafter, Told):
        assert engine.drafter.drafted > 20
        assert (engine.drafter.accepted > 0) == (drafter != "wrong")


@pytest.mark.each_value("name", "backend_name", "drafter")
@pytest.mark.parametrize("drafter", ["right", "random"])
@pytest.mark.parametrize("name", ["crosses_original", "windowed", "phimoe_window"])
def test_text_is_the_same_where_rows_shift_and_switch(
    name: str, drafter: str, ops: Backend, tmp_path: Path
):
    engine = engine_of(ops, CASES[name].write(tmp_path / "m.gguf"))
    longest = 300 if name == "windowed" else engine.context // 2
    made = [replace(r, logprobs=None) for r in requests(3, seed=3, longest=longest)]
    expected = alone(engine, made)
    assert max(len(answer[0]) for answer in expected) > 20
    engine.scheduler = Eager()
    engine.drafter = DRAFTERS[drafter](told(made, expected))
    for seed in (None, 1):
        assert together(engine, made, seed) == expected
