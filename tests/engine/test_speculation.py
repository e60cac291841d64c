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
from api.tiny_models import write_tiny
from conftest import make_backend

import phicore
from phicore.backend import Backend
from phicore.engine import Engine, Request, drafts
from phicore.engine import Sequence as Running
from phicore.engine import calls as calls_module
from phicore.engine.calls import Calls
from phicore.engine.drafts import Draft, Drafter, NGrams, Outlook
from phicore.engine.forced import Forced
from phicore.engine.rows import Rows
from phicore.engine.runner import Runner
from phicore.engine.scheduler import Scheduler
from phicore.engine.steps import Steps
from phicore.errors import ArgumentError
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

    def step_wanted(
        self,
        rows: int,
        most: int,
        drafts: Sequence[Draft | Outlook],
        *,
        token_s: float = 0.0,
        is_drawn: bool = False,
    ) -> int:
        sizes = [size for size in self.step_sizes(rows) if size <= most]
        has_some = any(draft.length for draft in drafts)
        return self._random.choice(sizes) if sizes and has_some else 1


class Always(Scheduler):
    """Checks the largest drafts."""

    def step_wanted(
        self,
        rows: int,
        most: int,
        drafts: Sequence[Draft | Outlook],
        *,
        token_s: float = 0.0,
        is_drawn: bool = False,
    ) -> int:
        sizes = [size for size in self.step_sizes(rows) if size <= most]
        return sizes[-1] if sizes and any(draft.length for draft in drafts) else 1


class Counted(Drafter):
    """Counts the tokens of drafts that were checked, and those that were right."""

    drafted = accepted = 0

    def checked(self, sequence: Running, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted


class Found(Counted, NGrams):
    """Guesses by n-grams."""


class Told(Counted):
    """Knows the answers, and is right about each token with a given chance."""

    def __init__(self, answers: dict[Any, list[int]], chance: float) -> None:
        self.answers, self.chance = answers, chance
        self.random = random.Random(7)

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


DRAFTERS: dict[str, Callable[[dict[Any, list[int]]], Counted]] = {
    "right": lambda answers: Told(answers, 1.0),
    "wrong": lambda answers: Told(answers, 0.0),
    "random": lambda answers: Told(answers, 0.7),
    "n-grams": lambda answers: Found(),
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


def alike(made: list[Request], logprobs: int | None) -> list[Request]:
    """Return requests that share batches and compiled steps, since all ask for the same things.

    Their answers have some tokens often, so that n-grams are found.
    """
    return [
        replace(
            request,
            sampling=Sampling(temperature=0.4 + 0.3 * number, repeat_penalty=1.1, repeat_last_n=16),
            processors=[AnswerPenalty(frequency=0.1 * number), LogitBias({3: 8.0, 5: 7.0})],
            max_tokens=max(request.max_tokens, 12 + number),
            logprobs=logprobs,
        )
        for number, request in enumerate(made)
    ]


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


# The 4 requests share the steps that JAX takes long to compile; the 16 are of all kinds.
@pytest.mark.parametrize("count", [4, pytest.param(16, marks=pytest.mark.complete)])
@pytest.mark.each_value("drafter", "backend_name")
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_text_is_the_same_with_drafts(
    drafter: str, count: int, ops: Backend, backend_name: str, path: Path
):
    engine = engine_of(ops, path)
    made = requests(count, seed=count, longest=16 if count == 4 else 24)
    made = alike(made, logprobs=3) if count == 4 else made
    expected = alone(engine, made)
    engine.scheduler = Eager(max_sequences=2 if count == 4 else 8)
    engine.drafter = counted = DRAFTERS[drafter](told(made, expected))
    is_exact = backend_name == "jax"
    found = [together(engine, [request])[0] for request in made]
    assert_same(found, expected, exact=is_exact)
    for seed in (None, 1):
        assert_same(together(engine, made, seed), expected, exact=is_exact)
    assert counted.drafted > 4  # how many depends on which steps are under way, so on the time
    assert (counted.accepted > 0) == (drafter != "wrong")


@pytest.mark.complete
@pytest.mark.parametrize("kinds", ["alike", pytest.param("all", marks=pytest.mark.complete)])
@pytest.mark.each_value("name", "backend_name", "drafter")
@pytest.mark.parametrize("drafter", ["right", "random"])
@pytest.mark.parametrize("name", ["crosses_original", "windowed", "phimoe_window"])
def test_text_is_the_same_where_rows_shift_and_switch(
    name: str, drafter: str, kinds: str, ops: Backend, tmp_path: Path
):
    engine = engine_of(ops, CASES[name].write(tmp_path / "m.gguf"))
    longest = 300 if name == "windowed" else 60
    made = [replace(r, logprobs=None) for r in requests(3, seed=3, longest=longest)]
    made = alike(made, logprobs=None) if kinds == "alike" else made
    expected = alone(engine, made)
    limit = engine.runner.config.original_max_position_embeddings
    if name == "windowed":
        limit = engine.runner.capacity_for(2**30)
    lengths = [(len(r.prompt_ids), len(a[0])) for r, a in zip(made, expected, strict=True)]
    assert any(prompt < limit < prompt + answer for prompt, answer in lengths)
    assert max(answer for _, answer in lengths) > 20
    engine.scheduler = Eager(max_sequences=2)
    engine.drafter = DRAFTERS[drafter](told(made, expected))
    for seed in (None, 1):
        assert together(engine, made, seed) == expected


# ---- ends, prefixes, random numbers of the device ------------------------------------------------


def engine_with(path: Path, answers: dict[Any, list[int]], chance: float = 1.0) -> Engine:
    """Return an engine on numpy with a drafter that knows the answers."""
    engine = engine_of(make_backend("numpy"), path)
    engine.scheduler, engine.drafter = Eager(), Told(answers, chance)
    return engine


@pytest.mark.parametrize("place", [1, 9, 15])
def test_end_inside_of_accepted_tokens_ends_the_answer(place: int, path: Path):
    request = Request([3, 1, 4], replace(DRAWN, temperature=2.0), max_tokens=24, seed=2)
    answer = list(engine_of(make_backend("numpy"), path).generate(request))
    first = answer.index(answer[place])
    engine = engine_with(path, {key(request): answer})
    ended = replace(request, ends=frozenset([answer[place]]))
    assert together(engine, [ended]) == [(answer[: first + 1], "stop", [])]


@pytest.mark.parametrize("limit", [1, 2, 5, 9])
def test_limit_inside_of_a_draft_ends_the_answer(limit: int, path: Path):
    request = Request([3, 1, 4], DRAWN, max_tokens=24, seed=2)
    answer = list(engine_of(make_backend("numpy"), path).generate(request))
    short = replace(request, max_tokens=limit)
    engine = engine_with(path, {key(short): answer})
    assert together(engine, [short]) == [(answer[:limit], "length", [])]


def test_stop_string_inside_of_accepted_tokens_ends_the_text(tmp_path: Path):
    with phicore.load(write_tiny(tmp_path / "m.gguf"), backend="numpy") as model:
        request = model.request("Hello", max_tokens=40, temperature=1.5, seed=3, ignore_eos=True)
        expected = model.generate(request).text()
        tokens = list(model.engine.generate(request))
        stop = expected[9:12]
        model.engine.scheduler = Eager()
        model.engine.drafter = Told({key(request): tokens}, 1.0)
        generation = model.generate(replace(request, stop=stop))
        assert generation.text() == expected[: expected.index(stop)]
        assert generation.timings.accepted_tokens > 0


@pytest.mark.parametrize("chance", [1.0, 0.6])
def test_next_turn_takes_over_what_accepted_tokens_have_stored(
    chance: float, path: Path, tmp_path: Path
):
    request = Request([3, 1, 4, 1, 5] * 4, DRAWN, max_tokens=29, seed=2)
    plain = engine_of(make_backend("numpy"), path)
    answer = list(plain.generate(request))
    text = [*request.prompt_ids, *answer]
    following = replace(request, prompt_ids=[*text, 7, 8])
    expected = list(plain.generate(following))
    engine = engine_with(path, {key(request): answer, key(following): expected}, chance)
    engine.prefixes.most_bytes = 10**9
    assert list(engine.generate(request)) == answer
    assert engine.save_session(tmp_path / "s", text, "m") == len(text) - 1
    other = engine_of(make_backend("numpy"), path)
    other.prefixes.most_bytes = 10**9
    other.load_session(tmp_path / "s", "m")
    for each in (engine, other):
        sequence = each.add(following)
        assert [t for output in each.outputs(sequence) for t in output.tokens] == expected
        assert sequence.timings.cached_tokens == len(text) - 1


def test_device_makes_the_same_random_numbers(path: Path):
    made = requests(4, seed=9, longest=20)
    expected = alone(engine_of(make_backend("numpy"), path), made)
    engine = engine_with(path, told(made, expected), 0.8)
    ops = engine.runner.ops
    ops.capabilities = replace(ops.capabilities, random_on_device=True)
    assert_same(together(engine, made), expected, exact=False)


def test_speculation_is_chosen_when_a_model_is_loaded(tmp_path: Path):
    path, drafter = write_tiny(tmp_path / "m.gguf"), NGrams()
    with phicore.load(path, "numpy") as model:
        assert model.engine.drafter is None
    with phicore.load(path, "numpy", speculation=True) as model:
        assert isinstance(model.engine.drafter, Forced)
        assert isinstance(model.engine.drafter.otherwise, NGrams)
        assert model.request("Hello", speculation=False).speculation is False
        with pytest.raises(ArgumentError, match=r"^speculation: expected True or False, got 'yes'"):
            model.generate("Hello", speculation="yes")
    with phicore.load(path, "numpy", speculation=drafter) as model:
        assert model.engine.drafter is drafter
    with pytest.raises(ArgumentError, match=r"^speculation: expected True, False or a Drafter"):
        phicore.load(path, "numpy", speculation="n-grams")


def test_request_and_processors_that_need_tokens_are_not_drafted(path: Path):
    request = Request([3, 1, 4], DRAWN, max_tokens=20, seed=2)
    answer = list(engine_of(make_backend("numpy"), path).generate(request))
    engine = engine_with(path, {key(request): answer})
    assert list(engine.generate(replace(request, speculation=False))) == answer
    assert isinstance(engine.drafter, Told)
    assert engine.drafter.drafted == 0
    sequence = engine.add(replace(request, processors=[Follows()]))
    assert [t for output in engine.outputs(sequence) for t in output.tokens] == answer
    assert engine.drafter.drafted == 0
    other = engine.add(request)
    list(engine.outputs(other))
    assert other.timings.accepted_tokens == engine.drafter.accepted > 10


class Follows(LogitsProcessor):
    """Changes nothing, and asks for each token."""

    @classmethod
    def apply(cls, ops: Backend, logits: Any, state: Any) -> Any:
        return logits

    def update(self, token: int) -> dict[str, np.ndarray]:
        return {}


# ---- faults that the tests above must see --------------------------------------------------------


def noise_of_the_first_token(self: Runner, rows: Rows, count: int = 1, room: Any = None) -> Any:
    numbers = self.ops.to_numpy(UNIFORMS(self, rows, count, room))
    return self.ops.asarray(numbers if room is None else np.stack([numbers[0]] * room))


def noise_of_the_token_before(self: Runner, rows: Rows, count: int = 1, room: Any = None) -> Any:
    numbers = self.ops.to_numpy(UNIFORMS(self, rows, count, room))
    return self.ops.asarray(numbers if room is None else np.stack([numbers[0], *numbers[:-1]]))


def window_of_the_first_token(ops: Backend, logits: Any, penalty: Any, draw: Any) -> Any:
    """The penalty of each token of a draft sees what the first one sees. B is 1."""
    recent = penalty["recent"]
    recent = ops.xp.broadcast_to(recent[:1, :], recent.shape)
    return SAMPLE(ops, logits, {**penalty, "recent": recent}, draw)


def recent_tokens_of_before(self: Steps, kinds: Any, *args: Any, **options: Any) -> Any:
    cache, token, _, *rest = VERIFY(self, kinds, *args, **options)
    return (cache, token, args[6]["recent"], *rest)


def states_of_the_first_token(self: Steps, states: Any, rows: Any) -> Any:
    return TAKE(self, states, rows * 0)


def rejected_slots_are_seen(self: Calls, rows: Rows, sequence: Running, *args: Any) -> Any:
    output = CHECKED(self, rows, sequence, *args)
    sequence.computed += len(args[0]) - len(output.tokens)
    return output


def one_too_many(tokens: list[int], inputs: list[int]) -> int:
    return min(ACCEPTED(tokens, inputs) + 1, len(tokens))


UNIFORMS, SAMPLE, VERIFY, TAKE = Runner._uniforms, sampler.sample, Steps.verify, Steps.take
CHECKED, ACCEPTED = Calls._checked, drafts.accepted


@pytest.fixture(scope="module")
def plain(path: Path) -> tuple[list[Request], list[Answer]]:
    """Return requests that depend on all of the states of a row, and their answers."""
    greedy = Sampling(temperature=0.0, repeat_penalty=1.5, repeat_last_n=5)
    drawn = Sampling(temperature=1.0, top_k=20, repeat_penalty=2.0)
    counted = [AnswerPenalty(frequency=0.9, presence=0.5)]
    made = [
        Request([seed, 3, 1, 4], sampling, max_tokens=20, seed=seed, processors=processors)
        for seed in range(2)
        for sampling, processors in [
            (greedy, ()),
            (drawn, ()),
            (Sampling(temperature=0.0), counted),
        ]
    ]
    return made, alone(engine_of(make_backend("numpy"), path), made)


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (Runner, "_uniforms", noise_of_the_first_token),
        (sampler, "sample", window_of_the_first_token),
        (Steps, "verify", recent_tokens_of_before),
        (Steps, "take", states_of_the_first_token),
        (Calls, "_checked", rejected_slots_are_seen),
        (Runner, "_uniforms", noise_of_the_token_before),
        (calls_module, "accepted", one_too_many),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_fault_is_seen(
    where: Any,
    name: str,
    fault: Any,
    path: Path,
    plain: tuple[list[Request], list[Answer]],
    monkeypatch: pytest.MonkeyPatch,
):
    made, expected = plain
    answers = told(made, expected)
    for is_planted in (False, True):
        if is_planted:
            monkeypatch.setattr(where, name, fault)
        engine = engine_with(path, answers, 0.7)
        found = [together(engine, [request])[0][0] for request in made]
        assert (found == [answer[0] for answer in expected]) != is_planted


# ---- predictions -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_prediction_saves_steps_and_changes_no_text(sampling: Sampling, path: Path):
    request = Request([3, 1, 4], sampling, max_tokens=40, seed=2)
    engine = engine_of(make_backend("numpy"), path)
    answer = list(engine.generate(request))
    engine.scheduler, engine.drafter = Eager(), NGrams()
    edited = [*answer[:15], 70, *answer[17:]]
    right, accepted = 0, []
    for prediction in ([], [7, 8, 9] * 9, answer, edited):
        sequence = engine.add(replace(request, prediction=prediction))
        outputs = list(engine.outputs(sequence))
        assert sequence.answer == answer
        accepted.append(sequence.timings.accepted_tokens)
        right = max(right, len(outputs))
    assert accepted[2] > accepted[3] > max(accepted[:2])
    assert accepted[2] > 25


def test_prediction_is_a_text_or_tokens(tmp_path: Path):
    options: dict[str, Any] = {"max_tokens": 30, "seed": 3, "ignore_eos": True}
    with phicore.load(write_tiny(tmp_path / "m.gguf"), "numpy", speculation=True) as model:
        model.engine.scheduler = Eager()
        plain = model.generate("Hello", **options)
        text = plain.text()
        ids = plain.token_ids[len(plain.prompt_ids) :]
        found = model.generate("Hello", prediction=ids, **options)
        assert found.text() == text
        assert found.timings.accepted_tokens > plain.timings.accepted_tokens
        assert model.generate("Hello", prediction=text, **options).text() == text
        spelled = model.request("Hello", prediction="<|end|>").prediction
        assert not set(spelled) & set(model.tokenizer.end_token_ids)
        for wrong in (7, ["a"], b"bytes"):
            with pytest.raises(ArgumentError, match=r"^prediction: expected a string or token ids"):
                model.request("Hello", prediction=wrong)
        with pytest.raises(ArgumentError, match=r"^prediction: text: expected valid Unicode"):
            model.request("Hello", prediction="\ud800")
