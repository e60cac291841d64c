"""Tests of the prefix cache: what ended sequences have computed is used, and changes no text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from api.tiny_models import write_tiny
from conftest import BACKENDS, make_backend
from hypothesis import given
from hypothesis import strategies as st

import phicore
from phicore.backend import Backend
from phicore.engine import Engine, Request
from phicore.engine.cache import Cache
from phicore.engine.prefixes import SHORTEST, Prefix, Prefixes
from phicore.network.sampling import Sampling
from phicore.testing import tiny_models
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model

GREEDY = Sampling(temperature=0.0)
CASES = {case.name: case for case in [*tiny_models.cases(), tiny_models.windowed()]}
LOTS = 10**9


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.F32, tokenizer=False)


def with_prefixes(ops: Backend, path: Path, count: int = LOTS) -> Engine:
    engine = engine_of(ops, path)
    engine.prefixes.most_bytes = count
    return engine


def run(engine: Engine, prompt: list[int], **options: object) -> tuple[list[int], int]:
    """Return an answer, and how many tokens of its prompt were not computed again."""
    options = {"max_tokens": 12, "seed": 3, **options}
    sequence = engine.add(Request(prompt, DRAWN, **options))  # type: ignore[arg-type]
    tokens = [token for output in engine.outputs(sequence) for token in output.tokens]
    return tokens, sequence.timings.cached_tokens


DRAWN = Sampling(temperature=1.2, top_k=30, repeat_penalty=1.1)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 80, count).tolist()


def test_next_turn_computes_only_what_is_new(ops: Backend, path: Path):
    cold, warm = engine_of(ops, path), with_prefixes(ops, path)
    prompt = random_tokens(60)
    answer, cached = run(warm, prompt)
    assert (answer, cached) == (run(cold, prompt)[0], 0)
    longer = [*prompt, *answer, *random_tokens(9, seed=1)]
    assert run(warm, longer) == (run(cold, longer)[0], len(prompt) + len(answer) - 1)
    other = [*prompt[:40], *random_tokens(20, seed=2)]
    assert run(warm, other) == (run(cold, other)[0], 40)
    assert run(warm, prompt) == (answer, 59)  # the last token is run, since its scores are needed
    assert run(warm, random_tokens(60, seed=4))[1] == 0
    assert warm.is_idle


def test_sequences_together_use_what_was_computed(path: Path):
    ops = make_backend("numpy")
    cold, warm = engine_of(ops, path), with_prefixes(ops, path)
    system = random_tokens(50)
    prompts = [[*system, *random_tokens(5 + i, seed=i)] for i in range(5)]
    expected = [run(cold, prompt)[0] for prompt in prompts]
    run(warm, prompts[0])
    for _ in range(2):
        sequences = [warm.add(Request(p, DRAWN, max_tokens=12, seed=3)) for p in prompts]
        while not warm.is_idle:
            warm.step()
        assert [sequence.answer for sequence in sequences] == expected
        assert all(sequence.timings.cached_tokens >= 50 for sequence in sequences)


NAMES = [name for name in ("numpy", "jax") if name in BACKENDS]


def asynchronous(name: str, steps: int) -> Backend:
    """Return a backend whose next call begins before the tokens of the last one are known."""
    ops = make_backend(name)
    ops.capabilities = replace(ops.capabilities, steps=steps, asynchronous=True)
    return ops


@pytest.mark.each_value("steps", "name")
@pytest.mark.parametrize("steps", [8, 1])
@pytest.mark.parametrize("name", NAMES)
def test_prefix_has_only_what_was_run(name: str, steps: int, path: Path):
    """Calls of several steps end early at an end token; rows that are done run along."""
    ops = asynchronous(name, steps)
    cold, warm = engine_of(ops, path), with_prefixes(ops, path)
    prompt = random_tokens(40)
    for seed in range(2):
        answer, _ = run(cold, prompt, seed=seed, max_tokens=30)
        ends = frozenset({answer[10 + seed]})
        answer, _ = run(warm, prompt, seed=seed, max_tokens=30, ends=ends)
        longer = [*prompt, *answer, *random_tokens(4, seed=seed)]
        assert run(warm, longer) == (run(cold, longer)[0], len(longer) - 5)
        warm.prefixes.clear()
    for size in (249, 253, 256):  # ends within the last slots of the cache
        prompt = random_tokens(size - 8)
        other = warm.add(Request(random_tokens(200, seed=7), GREEDY, max_tokens=40))
        answer, _ = run(warm, prompt, max_tokens=8)
        longer = [*prompt, *answer, *random_tokens(4, seed=size)]
        assert run(warm, longer)[0] == run(cold, longer)[0], size
        warm.abort(other)
        warm.prefixes.clear()


def test_prefix_that_cannot_be_kept_harms_nobody(path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = with_prefixes(make_backend("numpy"), path)
    requests = [Request(random_tokens(30, i), GREEDY, max_tokens=9 + i) for i in range(3)]
    expected = [list(engine.generate(request)) for request in requests]

    def no_memory(*args: object) -> None:
        raise MemoryError("no memory left")

    sequences = [engine.add(request) for request in requests]
    aborted = engine.add(Request(random_tokens(30, 9), GREEDY, max_tokens=90))
    while len(aborted.answer) < 2:
        engine.step()
    monkeypatch.setattr(engine.runner, "copy", no_memory)
    engine.abort(aborted)
    monkeypatch.undo()
    while not engine.is_idle:
        engine.step()
    assert [sequence.answer for sequence in sequences] == expected


def test_what_an_aborted_sequence_has_read_is_used(path: Path):
    engine = with_prefixes(make_backend("numpy"), path)
    prompt = random_tokens(60)
    sequence = engine.add(Request(prompt, GREEDY, max_tokens=50))
    while len(sequence.answer) < 3:
        engine.step()
    engine.abort(sequence)
    assert run(engine, prompt)[1] == 59


@pytest.mark.each_value("name", "backend_name")
@pytest.mark.parametrize("name", ["windowed", "crosses_original", "llama3"])
def test_text_is_the_same_with_windows_and_longrope(name: str, ops: Backend, tmp_path: Path):
    file = CASES[name].write(tmp_path / "m.gguf")
    cold, warm = engine_of(ops, file), with_prefixes(ops, file)
    size = {"windowed": 700, "crosses_original": 17}.get(name, 20)
    prompt, used = random_tokens(size), 0
    for turn in range(2):
        options = {"max_tokens": size // 3, "seed": turn}
        answer, cached = run(warm, prompt, **options)
        assert answer == run(cold, prompt, **options)[0], turn
        used += cached
        prompt = [*prompt, *answer, *random_tokens(5, seed=turn)]
        if len(prompt) + size // 3 > cold.context:
            break
    # keys that LongRoPE's short factors have rotated are of no use for the long ones
    assert used > 0


def test_padding_after_a_prefix_may_reach_beyond_the_original_context(tmp_path: Path):
    """A chunk of 16 that began 7 tokens before the end of the short factors was an error."""
    tiny = replace(PHI3, original_max_position_embeddings=256)
    path = write_model(tmp_path / "m.gguf", tiny, Type.F32, tokenizer=False)
    ops, prompt = make_backend("jax"), random_tokens(255)
    expected = run(engine_of(ops, path), prompt, max_tokens=1)[0]
    engine = with_prefixes(ops, path)
    run(engine, prompt[:249], max_tokens=1)
    assert run(engine, prompt, max_tokens=1) == (expected, 249)


def test_bytes_are_bounded_and_the_least_recently_used_go_first(path: Path):
    ops = make_backend("numpy")
    engine = with_prefixes(ops, path)
    first, second, third = (random_tokens(30, seed=i) for i in range(3))
    run(engine, first)
    engine.prefixes.most_bytes = 2 * engine.prefixes.bytes
    run(engine, second)
    assert run(engine, [*first, 1])[1] == 30  # used just now
    run(engine, third)
    assert len(engine.prefixes) == 2
    assert run(engine, [*second, 1])[1] == 0
    engine.prefixes.clear()
    engine.prefixes.most_bytes = 100  # no cache fits
    run(engine, first)
    assert len(engine.prefixes) == 0


TOKENS = st.lists(st.integers(0, 1), min_size=SHORTEST, max_size=24)


@given(kept=st.lists(TOKENS, max_size=4), asked=TOKENS, window=st.none() | st.integers(1, 8))
def test_prefix_that_is_found_is_one(
    kept: list[list[int]], asked: list[int], window: int | None
) -> None:
    prefixes, ops = Prefixes(LOTS, window), make_backend("numpy")
    for number, tokens in enumerate(kept):
        first = np.array([number if window else 0], np.int32)
        cache = Cache(ops, [{"k": np.zeros((1, 1, 4, 1))}], 4, np.zeros(1, np.int32), first)
        prefixes.add(Prefix(np.array(tokens, np.int32), False, cache))
    assert prefixes.find(asked, is_long=True) is None
    found = prefixes.find(asked, is_long=False)
    if found is not None:
        prefix, count = found
        assert SHORTEST <= count < len(asked)
        assert prefix.tokens[:count].tolist() == asked[:count]
        first = int(prefix.cache.first[0])
        assert first == 0 or (window is not None and first <= count - (window - 1))
    elif not window:
        most = min(len(asked) - 1, SHORTEST)
        assert most < SHORTEST or all(tokens[:most] != asked[:most] for tokens in kept)


def test_conversation_through_the_api_reads_only_what_is_new(tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf")
    with (
        phicore.load(path, "numpy") as model,
        phicore.load(path, "numpy", prefix_cache_bytes=0) as forgetful,
    ):
        messages = [{"role": "user", "content": "Tell me of the sea and of the ships. " * 3}]
        for turn in range(3):
            texts = []
            for each in (model, forgetful):
                generation = each.generate(messages, max_tokens=8, seed=turn)
                texts.append(generation.text())
                assert (generation.timings.cached_tokens > 0) == (turn > 0 and each is model)
            assert texts[0] == texts[1]
            messages += [
                {"role": "assistant", "content": texts[0]},
                {"role": "user", "content": f"And {turn}?"},
            ]


@pytest.mark.parametrize("count", [-1, 1.5, "1 GB", True])
def test_size_of_the_prefix_cache_is_checked(count: object, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    with pytest.raises(phicore.ArgumentError, match=r"^prefix_cache_bytes: expected 0 or more"):
        phicore.load(path, "numpy", prefix_cache_bytes=count)  # type: ignore[arg-type]
