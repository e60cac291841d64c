"""Sequences that run take over what others have computed of the same first tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api.tiny_models import write_tiny
from conftest import make_backend
from engine.test_prefixes import (
    CASES,
    DRAWN,
    GREEDY,
    LOTS,
    NAMES,
    asynchronous,
    random_tokens,
    run,
    with_prefixes,
)
from engine.test_speculation import Eager
from hypothesis import given
from hypothesis import strategies as st

import phicore
from phicore.backend import Backend
from phicore.engine import Engine, Request
from phicore.engine.drafts import NGrams
from phicore.engine.rows import Rows
from phicore.engine.scheduler import Scheduler
from phicore.engine.sequence import Sequence
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.F32, tokenizer=False)


def add(engine: Engine, prompt: list[int], **options: Any) -> Sequence:
    return engine.add(Request(prompt, DRAWN, **{"max_tokens": 12, "seed": 3, **options}))


def finish(engine: Engine) -> None:
    while not engine.is_idle:
        engine.step()


def tokens_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count the tokens of prompts that are run from now on."""
    sizes, read = list[int](), engine.runner.read

    def counted(rows: Rows, chunk: Any, **options: Any) -> None:
        sizes.append(chunk.end - chunk.start)
        read(rows, chunk, **options)

    monkeypatch.setattr(engine.runner, "read", counted)
    return lambda: sum(sizes)


def test_prompt_of_several_answers_is_read_once(
    ops: Backend, path: Path, monkeypatch: pytest.MonkeyPatch
):
    cold, warm = engine_of(ops, path), with_prefixes(ops, path)
    prompt = random_tokens(70)
    count = tokens_read(warm, monkeypatch)
    sequences = [add(warm, prompt, seed=seed) for seed in range(4)]
    finish(warm)
    assert count() == 70 + 3  # the last token is run for each, since its scores are needed
    assert [sequence.timings.cached_tokens for sequence in sequences] == [0, 69, 69, 69]
    expected = [run(cold, prompt, seed=seed)[0] for seed in range(4)]
    assert [sequence.answer for sequence in sequences] == expected


def test_common_beginning_of_several_prompts_is_read_once(
    ops: Backend, path: Path, monkeypatch: pytest.MonkeyPatch
):
    cold, warm = engine_of(ops, path), with_prefixes(ops, path)
    system = random_tokens(90)
    prompts = [[*system, *random_tokens(10 - 3 * i, seed=i + 1)] for i in range(3)]
    # Otherwise the sizes of chunks depend on times, and a gain of less than 16 tokens is not taken.
    monkeypatch.setattr(warm.scheduler, "most_tokens", lambda others: None)
    count = tokens_read(warm, monkeypatch)
    sequences = [add(warm, prompt) for prompt in prompts]
    finish(warm)
    assert [s.answer for s in sequences] == [run(cold, prompt)[0] for prompt in prompts]
    assert count() == 90 + 10 + 7 + 4


def test_without_a_prefix_cache_nothing_is_shared(path: Path):
    engine = engine_of(make_backend("numpy"), path)
    sequences = [add(engine, random_tokens(50)) for _ in range(2)]
    finish(engine)
    assert [sequence.timings.cached_tokens for sequence in sequences] == [0, 0]


@pytest.mark.each_value("steps", "name")
@pytest.mark.parametrize("steps", [8, 1])
@pytest.mark.parametrize("name", NAMES)
def test_answer_that_is_written_is_shared_as_far_as_it_was_run(name: str, steps: int, path: Path):
    """A call may have begun whose tokens nobody knows yet, in a row of a batch."""
    ops = asynchronous(name, steps)
    cold, warm = engine_of(ops, path), with_prefixes(ops, path)
    prompt = random_tokens(40)
    answer = run(cold, prompt, max_tokens=100)[0]
    for known in (3, 16, 30):
        others = [add(warm, random_tokens(20 + i, seed=i), max_tokens=60) for i in range(2)]
        first = add(warm, prompt, max_tokens=100)
        while len(first.answer) < known:
            warm.step()
        longer = [*prompt, *first.answer, *random_tokens(7, seed=9)]
        second = add(warm, longer)
        while not second.answer:
            warm.step()
        assert len(longer) - 8 <= second.timings.cached_tokens <= len(longer) - 7
        finish(warm)
        assert first.answer == answer
        assert second.answer == run(cold, longer)[0]
        assert [len(other.answer) for other in others] == [60, 60]
        warm.prefixes.clear()


@pytest.mark.each_value("name", "backend_name")
@pytest.mark.parametrize("name", ["windowed", "crosses_original", "llama3"])
def test_text_is_the_same_with_windows_and_longrope(name: str, ops: Backend, tmp_path: Path):
    file = CASES[name].write(tmp_path / "m.gguf")
    cold, warm = engine_of(ops, file), with_prefixes(ops, file)
    size = {"windowed": 700, "crosses_original": 17}.get(name, 20)
    prompt = random_tokens(size)
    prompts = [prompt, prompt, [*prompt[:-1], 5, 7], [*prompt, *random_tokens(size // 3, seed=1)]]
    sequences = [add(warm, each, max_tokens=12, seed=i) for i, each in enumerate(prompts)]
    finish(warm)
    for number, sequence in enumerate(sequences):
        expected = run(cold, prompts[number], max_tokens=12, seed=number)[0]
        assert sequence.answer == expected, number
    assert sum(sequence.timings.cached_tokens for sequence in sequences) > size


def test_prompt_that_cannot_be_copied_is_read(path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = with_prefixes(make_backend("numpy"), path)
    prompt = random_tokens(60)
    expected = run(engine_of(engine.runner.ops, path), prompt)[0]

    def no_memory(*args: object) -> None:
        raise MemoryError("no memory left")

    sequences = [add(engine, prompt) for _ in range(2)]
    while not sequences[0].answer:
        engine.step()
    with monkeypatch.context() as patched:
        patched.setattr(engine.runner, "copy", no_memory)
        while not sequences[1].is_read:
            engine.step()
    finish(engine)
    assert [sequence.answer for sequence in sequences] == [expected, expected]
    assert sequences[1].timings.cached_tokens == 0


PROMPTS = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=2, max_size=7)


@pytest.fixture(scope="module")
def pair(path: Path) -> tuple[Engine, Engine]:
    """Return an engine that shares nothing, and one that does."""
    ops = make_backend("numpy")
    return engine_of(ops, path), with_prefixes(ops, path)


@given(prompts=PROMPTS, steps=st.lists(st.integers(0, 5), min_size=7, max_size=7), data=st.data())
def test_whoever_comes_and_goes_no_text_changes(
    pair: tuple[Engine, Engine], prompts: list[tuple[int, int]], steps: list[int], data: Any
):
    cold, warm = pair
    warm.prefixes.clear()
    warm.prefixes.most_bytes = data.draw(st.sampled_from([1, LOTS]))
    warm.drafter = data.draw(st.sampled_from([None, NGrams()]))
    warm.scheduler = Eager() if warm.drafter else Scheduler()
    warm.scheduler.chunk_s = data.draw(st.sampled_from([None, 1e-9]))
    common = random_tokens(90)
    sequences = []
    for number, (shared, own) in enumerate(prompts):
        prompt = [*common[:shared], *random_tokens(own, seed=number % 3)]
        sequences.append(add(warm, prompt, seed=number, max_tokens=4))
        for _ in range(steps[number]):
            warm.step()
        if data.draw(st.integers(0, 5)) == 0:
            warm.abort(data.draw(st.sampled_from(sequences)))
    finish(warm)
    for sequence in sequences:
        if sequence.finish_reason == "length":
            assert sequence.answer == list(cold.generate(sequence.request))


def test_choices_of_a_request_read_its_prompt_once(tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf")
    text = "Tell me of the sea and of the ships. " * 3
    with phicore.load(path, "numpy") as model:
        requests = [model.request(text, max_tokens=8, seed=seed) for seed in range(3)]
        answers = list(model.generate_many(requests))
        alone = [model.generate(text, max_tokens=8, seed=seed).text() for seed in range(3)]
    assert [answer.text for answer in sorted(answers, key=lambda each: each.index)] == alone
    size = len(requests[0].prompt_ids)
    known = [answer.generation.timings.cached_tokens for answer in answers if answer.generation]
    assert sorted(known) == [0, size - 1, size - 1]


def test_only_what_is_computed_is_compared(path: Path):
    """Long prompts that differ at once are not looked at token by token."""
    engine = with_prefixes(make_backend("numpy"), path)
    first = engine.add(Request(random_tokens(60), GREEDY, max_tokens=50))
    while not first.answer:
        engine.step()
    second = engine.add(Request(random_tokens(60, seed=1), GREEDY, max_tokens=2))
    finish(engine)
    assert second.timings.cached_tokens == 0
    alone = engine_of(engine.runner.ops, path).generate(second.request)
    assert second.answer == list(alone)
