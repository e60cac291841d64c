"""A second model as the drafter never changes a text, follows what was accepted, and gives up.

The model that guesses is the model itself, whose guesses are right where the text is greedy and
some of them where it is drawn, or one with other random weights, whose guesses are wrong.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api.tiny_models import with_value, write_tiny
from conftest import make_backend
from engine.test_speculation import Always, Eager, alone, requests, together

import phicore
from phicore.backend import Backend
from phicore.engine import Engine, Request
from phicore.engine import Sequence as Running
from phicore.engine.draft_model import ModelDrafter
from phicore.engine.drafts import Draft, Drafter, Either, NGrams, Outlook, Plan
from phicore.engine.scheduler import Scheduler
from phicore.errors import ArgumentError
from phicore.network.sampling import Sampling
from phicore.testing import tiny_models
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Tiny, Type, write_model

GREEDY = Sampling(temperature=0.0)
NEAR_GREEDY = [Sampling(temperature=temperature) for temperature in (0, 0.15, 0.3)]
ALIKE = [replace(sampling, top_k=0, top_p=1.0, min_p=0.0) for sampling in NEAR_GREEDY[1:]]
"""Samplings that are one step: drawn, and without filters."""
WILD = Sampling(temperature=1.1, repeat_penalty=1.0)
CASES = {case.name: case for case in [*tiny_models.cases(), tiny_models.windowed()]}


class Timed(Scheduler):
    """Decides as usual, as if each step took a second, and notes the sizes it has chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.steps_s = {(1, 1, False): 1.0, (1, 1, True): 1.0}
        self.chosen: list[int] = []

    def step_took(self, rows: int, size: int, seconds: float, *, is_drawn: bool) -> None:
        pass

    def plan_wanted(self, *args: Any, **options: Any) -> Any:
        found = super().plan_wanted(*args, **options)
        self.chosen.append(found[0])
        return found


class Counted(ModelDrafter):
    """Counts the tokens of drafts that were checked, and those that were right."""

    drafted = accepted = 0

    def checked(self, sequence: Running, drafted: int, accepted: int) -> None:
        super().checked(sequence, drafted, accepted)
        self.drafted += drafted
        self.accepted += accepted


def drafter_of(engine: Engine) -> Counted:
    return Counted(engine.runner, engine.context)


def file(folder: Path, tiny: Tiny = PHI3, seed: int = 0) -> Path:
    path = folder / f"{seed}.gguf"
    return write_model(path, tiny, Type.Q4_K, seed=seed, tokenizer=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file(tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a smaller model with other weights."""
    tiny = replace(PHI3, hidden_size=256, num_hidden_layers=1, num_attention_heads=4)
    return file(tmp_path_factory.mktemp("o"), tiny, seed=1)


@pytest.fixture
def engine(path: Path) -> Engine:
    return engine_of(make_backend("numpy"), path)


def drafting(path: Path, by: Path | None = None) -> tuple[Engine, Counted]:
    """Return an engine on numpy that checks all drafts of another one with this file."""
    engine = engine_of(make_backend("numpy"), path)
    engine.scheduler = Always()
    engine.drafter = drafter = drafter_of(engine_of(make_backend("numpy"), by or path))
    return engine, drafter


def near_greedy(
    count: int, longest: int, samplings: Sequence[Sampling] = NEAR_GREEDY
) -> list[Request]:
    """Return requests of whose tokens many, but not all, are the most probable ones."""
    return [
        replace(
            request,
            sampling=samplings[number % len(samplings)],
            processors=[],
            max_tokens=max(request.max_tokens, 12 + number),
            logprobs=None,
        )
        for number, request in enumerate(requests(count, seed=count, longest=longest))
    ]


# The 4 requests share the steps that JAX takes long to compile; the 12 are of all kinds.
@pytest.mark.parametrize("count", [4, pytest.param(12, marks=pytest.mark.complete)])
@pytest.mark.each_value("drafts", "backend_name")
@pytest.mark.complete_where(backend_name="mlx")
@pytest.mark.parametrize("drafts", ["itself", "other", "either"])
def test_text_is_the_same_with_a_draft_model(
    drafts: str, count: int, ops: Backend, path: Path, other: Path
):
    engine = engine_of(ops, path)
    made = near_greedy(count, 30, ALIKE) if count == 4 else near_greedy(count, 30)
    expected = alone(engine, made)
    engine.scheduler = Eager(max_sequences=2 if count == 4 else 3)
    counted = drafter_of(engine_of(ops, other if drafts == "other" else path))
    engine.drafter = Either(NGrams(), counted) if drafts == "either" else counted
    assert [together(engine, [request])[0] for request in made] == expected
    for seed in (None, 1, 2):
        assert together(engine, made, seed) == expected
    assert counted.drafted > 20
    assert (counted.accepted > counted.drafted / 5) == (drafts != "other")


@pytest.mark.complete
@pytest.mark.parametrize("by", ["windowed", "plain"])
@pytest.mark.parametrize("name", ["crosses_original", "windowed", "phimoe_window"])
def test_text_is_the_same_where_rows_shift_and_switch(name: str, by: str, tmp_path: Path):
    path = CASES[name].write(tmp_path / "m.gguf")
    engine = engine_of(make_backend("numpy"), path)
    longest = 300 if name == "windowed" else 60
    made = near_greedy(3, longest)
    expected = alone(engine, made)
    draft = path if by == "windowed" else file(tmp_path, replace(PHI3, max_position_embeddings=90))
    engine.scheduler = Eager(max_sequences=2)
    engine.drafter = counted = drafter_of(engine_of(make_backend("numpy"), draft))
    for seed in (None, 1):
        assert together(engine, made, seed) == expected
    assert counted.drafted > 20
    assert not counted._is_off
    if by == "windowed" and name != "crosses_original":
        assert counted.accepted > counted.drafted / 5


@pytest.mark.complete
@pytest.mark.parametrize("is_on_device", [False, True])
@pytest.mark.parametrize(
    "samplings",
    [[GREEDY] * 2, [WILD] * 2, [GREEDY, WILD], [replace(WILD, top_k=20, min_p=0.01), WILD]],
    ids=["greedy", "drawn", "both", "filtered"],
)
def test_own_guesses_are_all_right(samplings: list[Sampling], is_on_device: bool, path: Path):
    """What is drawn is guessed as well, since the guesses are drawn with the same numbers."""
    engine = engine_of(make_backend("numpy"), path)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    made = [
        Request(prompt, sampling, max_tokens=57, seed=2**63 + 5)
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    expected = alone(engine, made)
    for request, answer in zip(made, expected, strict=True):
        engine, drafter = drafting(path)
        ops = drafter._runner.ops
        ops.capabilities = replace(ops.capabilities, random_on_device=is_on_device)
        assert together(engine, [request]) == [answer]
        assert drafter.drafted == drafter.accepted == 49
    engine, drafter = drafting(path)
    assert together(engine, made) == expected
    assert drafter.drafted == drafter.accepted > 60


def test_steps_of_a_greedy_text_are_few(path: Path, engine: Engine):
    request = Request([3, 1, 4, 1, 5], GREEDY, max_tokens=57)
    expected = list(engine.generate(request))
    guessing = engine_of(make_backend("numpy"), path)
    engine.scheduler, engine.drafter = Always(), drafter_of(guessing)
    big, small = calls_of(engine), calls_of(guessing)
    assert list(engine.generate(request)) == expected
    assert big == [5, *[8] * 7]  # the prompt and its first token, then 7 times 8 tokens
    # The prompt is no longer than a step. All but the last guess of a draft were run already.
    assert small == [8, *[1] * 6, *[2, *[1] * 6] * 6]


def calls_of(engine: Engine) -> list[int]:
    """Return a list that gets the number of tokens of each step of an engine's network."""
    found: list[int] = []
    pure, hidden = engine.runner.steps.pure, engine.runner.steps.pure.hidden

    def counted(*args: Any) -> Any:
        found.append(args[4].shape[1])
        return hidden(*args)

    pure.hidden = counted  # type: ignore[method-assign]
    return found


# ---- what is asked, and when ---------------------------------------------------------------------


def test_wrong_model_is_switched_off_and_tried_again(path: Path, other: Path):
    request = Request([3, 1, 4], GREEDY, max_tokens=380)
    expected = list(engine_of(make_backend("numpy"), path).generate(request))
    engine, drafter = drafting(path, other)
    engine.scheduler = timed = Timed()
    assert list(engine.generate(request)) == expected
    checked = [size > 1 for size in timed.chosen]
    assert all(checked[:3])
    assert sum(checked[:20]) < 10
    assert 1 <= sum(checked[20:]) < 20
    assert drafter.accepted < drafter.drafted / 4
    # The next text begins with what is known of the model.
    timed.chosen.clear()
    list(engine.generate(replace(request, max_tokens=30)))
    assert timed.chosen.count(1) > 20


def test_right_model_stays_on(path: Path):
    request = Request([3, 1, 4], GREEDY, max_tokens=100)
    expected = list(engine_of(make_backend("numpy"), path).generate(request))
    engine, drafter = drafting(path)
    engine.scheduler = timed = Timed()
    assert list(engine.generate(request)) == expected
    assert timed.chosen[0] == 4  # a guess is thought to be right in 70 %
    assert set(timed.chosen[4:-2]) == {8}
    assert drafter.drafted == drafter.accepted > 70


def test_model_that_takes_longer_than_it_saves_is_not_asked(path: Path):
    engine, drafter = drafting(path)
    engine.scheduler = timed = Timed()
    timed.steps_s = dict.fromkeys(timed.steps_s, 1e-09)
    list(engine.generate(Request([3, 1, 4], GREEDY, max_tokens=100)))
    assert drafter.drafted == 3  # whose time was then known
    assert timed.chosen.count(1) == len(timed.chosen) - 1


def test_n_grams_come_first_where_they_are_as_likely_right():
    one, two = (Running(Request([1, 2]), 9, "length", False) for _ in range(2))
    quick, slow = Guessing(5, {one: 0.9, two: 0.2}), Guessing(6, {one: 0.8, two: 0.8}, 0.1)
    drafter = Either(quick, slow)
    free, mixed = drafter.plans([one, two], 3)
    assert (free.token_s, mixed.token_s) == (0.0, 0.1)
    assert [mixed.outlooks[s].chance for s in (one, two)] == [0.9, 0.8]
    made = mixed.make(2)
    assert [made[s].tokens for s in (one, two)] == [(5, 5), (6, 6)]
    drafter.checked(one, 2, 1)
    drafter.checked(two, 2, 2)
    assert (quick.told, slow.told) == ([(one, 2, 1)], [(two, 2, 2)])
    assert [draft.tokens for draft in drafter.draft([two], 1)] == [(6,)]


class Guessing(Drafter):
    """Guesses one token again and again, with a chance and a time that are given."""

    def __init__(self, token: int, chances: dict[Running, float], token_s: float = 0.0) -> None:
        self.token, self.chances, self.token_s = token, chances, token_s
        self.told: list[tuple[Running, int, int]] = []

    def draft(self, sequences: Sequence[Running], most: int) -> list[Draft]:
        return [Draft((self.token,) * most, self.chances[sequence]) for sequence in sequences]

    def plans(self, sequences: Sequence[Running], most: int) -> list[Plan]:
        outlooks = {s: Outlook(most, self.chances[s]) for s in sequences if s in self.chances}
        make = lambda count: dict(zip(outlooks, self.draft([*outlooks], count), strict=True))  # noqa: E731
        return [Plan(outlooks, make, self.token_s)]

    def checked(self, sequence: Running, drafted: int, accepted: int) -> None:
        self.told.append((sequence, drafted, accepted))


# ---- what the small model has read ---------------------------------------------------------------


def test_prompt_is_read_in_chunks_and_the_next_turn_reads_what_is_new(path: Path):
    prompt = [(7 * i * i + 3) % 80 for i in range(150)]
    request = Request(prompt, GREEDY, max_tokens=33)
    guessing = engine_of(make_backend("numpy"), path)
    guessing.runner.ops.capabilities = replace(
        guessing.runner.ops.capabilities, prompt_chunks=(1, 16, 64)
    )
    engine = engine_of(make_backend("numpy"), path)
    engine.scheduler, engine.drafter = Always(), drafter_of(guessing)
    small = calls_of(guessing)
    answer = list(engine.generate(request))
    assert small[:3] == [64, 64, 24]  # all but the last token, while the answer has begun
    assert max(small[3:]) <= 8
    small.clear()
    text = [*prompt, *answer, *range(20)]
    following = replace(request, prompt_ids=text)
    assert list(engine.generate(following)) == list(
        engine_of(make_backend("numpy"), path).generate(following)
    )
    assert 19 <= small[0] <= 28  # the new tokens, and those of the answer that were not run


def test_text_that_went_on_without_drafts_is_read_on(path: Path):
    request = Request([3, 1, 4], GREEDY, max_tokens=90)
    expected = list(engine_of(make_backend("numpy"), path).generate(request))
    engine, drafter = drafting(path)
    sequence = engine.add(request)
    while not engine.is_idle:
        pause = 20 < len(sequence.answer) < 60
        engine.scheduler.max_sequences = 1
        engine.drafter = None if pause else drafter
        engine.step()
    assert sequence.answer == expected
    assert drafter.drafted == drafter.accepted > 30


def test_ended_and_aborted_sequences_leave_nothing(path: Path):
    engine, drafter = drafting(path)
    made = near_greedy(4, longest=20)
    expected = alone(engine_of(make_backend("numpy"), path), made)
    running = [engine.add(request) for request in made]
    for _ in range(12):
        engine.step()
    engine.abort(running[1])
    engine.abort(running[2])
    while not engine.is_idle:
        engine.step()
    for number in (0, 3):
        assert running[number].answer == expected[number][0]
    assert not drafter._is_off
    del running
    gc.collect()
    assert not len(drafter._texts)
    assert together(engine, made) == expected


def test_batch_of_drafts_shrinks_with_the_sequences(path: Path):
    engine, drafter = drafting(path)
    made = [Request([1 + i], GREEDY, max_tokens=12 + 60 * (i == 5)) for i in range(6)]
    expected = alone(engine_of(make_backend("numpy"), path), made)
    assert together(engine, made) == expected
    assert len(drafter._rows) <= 2
    assert drafter.drafted == drafter.accepted


def test_small_context_of_the_draft_model_ends_drafts(path: Path, tmp_path: Path):
    engine, drafter = drafting(path)
    drafter._context = 40
    request = Request([3, 1, 4], GREEDY, max_tokens=90)
    expected = list(engine_of(make_backend("numpy"), path).generate(request))
    assert list(engine.generate(request)) == expected
    assert drafter.drafted == drafter.accepted == 28


def test_failing_draft_model_is_turned_off(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    request = Request([3, 1, 4], GREEDY, max_tokens=60)
    expected = list(engine_of(make_backend("numpy"), path).generate(request))
    engine, drafter = drafting(path)
    calls = []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 10:
            raise MemoryError("no memory is left")
        return guess(*args)

    guess = drafter._guess()
    monkeypatch.setattr(drafter, "_guess", lambda: failing)
    assert list(engine.generate(request)) == expected
    assert len(calls) == 10
    assert caplog.messages == ["the draft model is not used any more: no memory is left"]


@pytest.mark.complete
def test_nothing_is_compiled_for_drafts_after_the_warm_up(path: Path, other: Path):
    ops = make_backend("jax")
    engine = engine_of(ops, path)
    engine.scheduler = Always(max_sequences=2)
    engine.drafter = drafter_of(engine_of(ops, other))
    engine.warm_up([GREEDY, WILD])
    drafting = engine.drafter._runner.steps
    reported: list[str] = []
    for steps in (drafting, engine.runner.steps):
        steps.progress = lambda what, done, total: reported.append(what)
    made = near_greedy(3, longest=40)
    samplings = [GREEDY, WILD, GREEDY]
    made = [replace(r, sampling=s) for r, s in zip(made, samplings, strict=True)]
    expected = alone(engine_of(ops, path), made)
    assert together(engine, made, 1) == expected
    assert engine.drafter.drafted > 20
    assert not reported


# ---- Model ---------------------------------------------------------------------------------------


def test_draft_model_is_a_reference_or_a_loaded_model(tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf")
    other = write_tiny(tmp_path / "o.gguf", num_hidden_layers=1)
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True}
    with phicore.load(path, "numpy") as plain:
        expected = plain.generate("Hello", **options).text()
        with phicore.load(path, "numpy", draft_model=plain) as model:
            model.engine.scheduler = Always()
            generation = model.generate("Hello", **options)
            assert generation.text() == expected
            times = generation.timings  # some drafts are of n-grams
            assert times.accepted_tokens > times.drafted_tokens / 2 > 0
            without = model.generate("Hello", speculation=False, **options)
            assert without.text() == expected
            assert without.timings.drafted_tokens == 0
    with phicore.load(path, "numpy", draft_model=other) as model:
        model.engine.scheduler = Always()
        generation = model.generate("Hello", **options)
        assert generation.text() == expected
        assert generation.timings.drafted_tokens > generation.timings.accepted_tokens


def test_draft_model_on_a_device_that_checks_no_guesses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    path = write_tiny(tmp_path / "m.gguf")
    kind = type(make_backend("numpy"))
    begin = kind.__init__

    def several_steps(self: Backend, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        self.capabilities = replace(self.capabilities, steps=4)

    monkeypatch.setattr(kind, "__init__", several_steps)
    with phicore.load(path, "numpy", draft_model=path) as model:
        assert caplog.messages == [
            "guesses are not checked on this device: the draft model is unused"
        ]
        assert model.generate("Hello", max_tokens=20).timings.drafted_tokens == 0


def test_memory_of_the_draft_model_counts(tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf")
    with phicore.load(path, "numpy", kv_memory=10**6, draft_model=path) as model:
        assert model.engine.kv_usage[2] == 5 * 10**5
        least = 256 * 2 * model.engine.runner.slot_bytes
    phicore.load(path, "numpy", kv_memory=least, draft_model=path).close()
    expected = f"^kv_memory: expected {least} bytes or more for this model, got {least - 2}"
    with pytest.raises(ArgumentError, match=expected):
        phicore.load(path, "numpy", kv_memory=least - 2, draft_model=path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vocab_size": 360}, "it has 360 tokens instead of 352"),
        ({"edit": "tokens"}, "token 300 is 'x!' instead of "),
    ],
)
def test_other_vocabulary_is_refused(changes: dict[str, Any], problem: str, tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf")
    if "edit" in changes:
        changes = {"edit": with_value("tokenizer.ggml.tokens", changed_tokens(path))}
    other = write_tiny(tmp_path / "o.gguf", **changes)
    start = "draft_model: o.gguf has another vocabulary than the model: "
    with pytest.raises(ArgumentError, match="^" + re.escape(start + problem)):
        phicore.load(path, "numpy", draft_model=other)


def changed_tokens(path: Path) -> list[str]:
    with phicore.load(path, "numpy") as model:
        tokens = list(model.metadata["tokenizer.ggml.tokens"])
    tokens[300] = "x!"
    return tokens
