"""The text of a request does not depend on the others: alone, together, whenever they come.

Prompts, limits, parameters and seeds are random. Some sequences cross a window's shift, or the
original context of a model with LongRoPE, while others do not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, make_backend
from engine import test_speculation as speculation

from phicore.backend import Backend
from phicore.engine import Engine, Request, Sequence
from phicore.engine.rows import Rows
from phicore.engine.runner import Runner
from phicore.engine.scheduler import Scheduler
from phicore.network import sampler
from phicore.network.processors import AnswerPenalty, LogitBias, LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.testing import tiny_models
from phicore.testing.conformance.models import PHI3, engine_of
from phicore.testing.tiny_models import Type, write_model

pytestmark = pytest.mark.as_for_users
VOCABULARY = 80


class NotTwice(LogitsProcessor):
    """A plugin's own processor, which needs each token on the host: no token comes twice."""

    def start(self, prompt: Any, vocab_size: int) -> dict[str, np.ndarray]:
        self._bias = np.zeros(vocab_size, np.float32)
        return {"bias": self._bias}

    @classmethod
    def apply(cls, ops: Backend, logits: Any, state: Any) -> Any:
        return logits + state["bias"]

    def update(self, token: int) -> dict[str, np.ndarray]:
        self._bias = self._bias.copy()
        self._bias[token] = -1e9
        return {"bias": self._bias}


class NotTwiceInCompany(NotTwice):
    """The same, in steps that others share."""

    @classmethod
    def neutral(cls, vocab_size: int) -> dict[str, np.ndarray]:
        return {"bias": np.zeros(vocab_size, np.float32)}


PROCESSORS: list[Callable[[], list[LogitsProcessor]]] = [
    list,
    list,
    list,
    lambda: [LogitBias({5: 4.0, 7: -1e9})],
    lambda: [AnswerPenalty(frequency=0.7, presence=0.3)],
    lambda: [NotTwice()],
    lambda: [NotTwiceInCompany()],
]


def requests(count: int, seed: int, longest: int) -> list[Callable[[], Request]]:
    """Return functions that make random requests, since a processor serves one generation."""
    rng = random.Random(seed)

    def make() -> Callable[[], Request]:
        sampling = Sampling(temperature=0.0, repeat_penalty=rng.choice([1.0, 1.3]))
        if rng.random() < 0.7:
            sampling = Sampling(
                temperature=rng.choice([0.7, 1.3]),
                top_k=rng.choice([0, 20]),
                top_p=rng.choice([1.0, 0.9]),
                min_p=rng.choice([0.0, 0.02]),
                repeat_penalty=rng.choice([1.0, 1.2]),
                repeat_last_n=rng.choice([-1, 16, 64]),
            )
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))]
        options = {"max_tokens": rng.randint(1, longest), "seed": rng.randrange(2**64)}
        ends = frozenset(rng.sample(range(VOCABULARY), rng.randint(0, 3)))
        processors = rng.choice(PROCESSORS)
        return lambda: Request(prompt, sampling, ends=ends, processors=processors(), **options)

    return [make() for _ in range(count)]


def together(engine: Engine, made: list[Callable[[], Request]], seed: int | None = None) -> Any:
    """Run requests at the same time; with a seed, they come at random times. Return the answers."""
    rng = random.Random(seed)
    last = 0 if seed is None else 6 * len(made)
    waiting = sorted((rng.randint(0, last), number) for number in range(len(made)))
    found: dict[int, Sequence] = {}
    step = 0
    while waiting or not engine.is_idle:
        while waiting and waiting[0][0] <= step:
            number = waiting.pop(0)[1]
            found[number] = engine.add(made[number]())
        engine.step()
        step += 1
    return [(found[n].answer, found[n].finish_reason) for n in range(len(made))]


def alone(engine: Engine, made: list[Callable[[], Request]]) -> Any:
    return [together(engine, [request])[0] for request in made]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.F32, tokenizer=False)


CASES = {case.name: case for case in [*tiny_models.cases(), tiny_models.windowed()]}


@pytest.mark.parametrize("count", [5, pytest.param(32, marks=pytest.mark.complete)])
def test_text_is_the_same_alone_and_in_a_crowd(ops: Backend, path: Path, count: int):
    engine, made = engine_of(ops, path), requests(count, seed=count, longest=count + 7)
    expected = alone(engine, made)
    assert together(engine, made) == expected
    for seed in range(1 if count == 5 else 2):
        assert together(engine, made, seed) == expected


@pytest.mark.complete
@pytest.mark.each_value("name", "backend_name")
@pytest.mark.parametrize("name", ["crosses_original", "windowed", "phimoe_window"])
def test_text_is_the_same_where_rows_shift_and_switch_at_other_times(
    name: str, ops: Backend, tmp_path: Path
):
    engine = engine_of(ops, CASES[name].write(tmp_path / "m.gguf"))
    longest = 300 if name == "windowed" else engine.context // 2
    made = requests(3, seed=3, longest=longest)
    expected = alone(engine, made)
    for seed in (None, 1):
        assert together(engine, made, seed) == expected


@pytest.mark.complete
def test_text_and_log_probabilities_are_the_same_with_drafts(
    ops: Backend, backend_name: str, path: Path
):
    """Check with optimized steps what test_speculation.py checks with quickly compiled ones."""
    engine = engine_of(ops, path)
    made = speculation.alike(speculation.requests(4, seed=4, longest=16), logprobs=3)
    expected = speculation.alone(engine, made)
    engine.scheduler = speculation.Eager(max_sequences=2)
    engine.drafter = speculation.Told(speculation.told(made, expected), 0.7)
    for seed in (None, 1):
        found = speculation.together(engine, made, seed)
        speculation.assert_same(found, expected, exact=backend_name == "jax")


@pytest.mark.each_value("sizes", "backend_name")
@pytest.mark.parametrize("sizes", [(1, 16), (1, 16, 64), (1, 64, 256)], ids=str)
def test_text_is_the_same_with_chunks_of_other_sizes(
    sizes: tuple[int, ...], ops: Backend, path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine, made = engine_of(ops, path), requests(4, seed=6, longest=90)
    expected = alone(engine, made)
    changed = replace(ops.capabilities, prompt_chunks=sizes)
    monkeypatch.setattr(ops, "capabilities", changed)
    engine.prefixes.most_bytes = 10**8
    for seed in (None, 2):
        assert together(engine, made, seed) == expected


@pytest.mark.parametrize("most", [1, 2, 5])
def test_text_is_the_same_with_fewer_rows(path: Path, most: int):
    engine, made = engine_of(make_backend("numpy"), path), requests(6, seed=1, longest=12)
    expected = alone(engine, made)
    engine.scheduler = Scheduler(max_sequences=most)
    assert together(engine, made) == expected


def test_no_sequence_ends_another_when_it_is_aborted(path: Path):
    engine, made = engine_of(make_backend("numpy"), path), requests(6, seed=2, longest=20)
    expected = alone(engine, made)
    sequences = [engine.add(request()) for request in made]
    for step in range(200):
        engine.step()
        if step % 3 == 0 and step // 3 < 3:
            engine.abort(sequences[2 * (step // 3)])
    assert engine.is_idle
    for number, sequence in enumerate(sequences):
        answer, reason = expected[number]
        if sequence.finish_reason == "abort":
            assert sequence.answer == answer[: len(sequence.answer)]
        else:
            assert (sequence.answer, sequence.finish_reason) == (answer, reason)


def test_processor_that_fails_ends_its_sequence_alone(path: Path):
    class Fails(NotTwice):
        def update(self, token: int) -> dict[str, np.ndarray]:
            if not self._bias.any():
                return super().update(token)
            raise ZeroDivisionError("no more")

    engine, made = engine_of(make_backend("numpy"), path), requests(4, seed=5, longest=20)
    expected = alone(engine, made)
    sequences = [engine.add(request()) for request in made]
    failing = engine.add(Request([1, 2], max_tokens=5, processors=[Fails()]))
    with pytest.raises(ZeroDivisionError, match="no more"):
        list(engine.outputs(failing))
    while not engine.is_idle:
        engine.step()
    assert [(s.answer, s.finish_reason) for s in sequences] == expected


# ---- faults that the tests above must see --------------------------------------------------------


def noise_by_row(self: Runner, rows: Rows, count: int = 1, room: int | None = None) -> Any:
    size = self.config.vocab_size
    found = [
        sampler.uniforms(row, 0 if s is None else s.sampled, size)
        for row, s in enumerate(rows.sequences)
    ]
    return self.ops.asarray(np.stack(found))


def stale_slot(self: Rows, count: int) -> np.ndarray:
    """Positions as if each row were as long as the longest, so that slots of others are seen."""
    longest = max(sequence.computed for sequence in self.live)
    return np.full(len(self.sequences), longest, np.int32)


def penalty_of_first_row(
    ops: Backend, logits: Any, recent: Any, last_n: Any, repeat_penalty: Any
) -> Any:
    xp = ops.xp
    recent = xp.broadcast_to(recent[:1, :], recent.shape)
    return APPLY(ops, logits, recent, last_n, repeat_penalty)


APPLY = sampler.apply_repeat_penalty


@pytest.mark.parametrize(
    ("where", "name", "fault"),
    [
        (Runner, "_uniforms", noise_by_row),
        (Rows, "positions", stale_slot),
        (sampler, "apply_repeat_penalty", penalty_of_first_row),
    ],
    ids=["noise keyed by the row", "a stale slot is seen", "another row's penalty"],
)
def test_fault_is_seen(
    where: Any, name: str, fault: Any, path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine, made = engine_of(make_backend("numpy"), path), requests(6, seed=4, longest=16)
    expected = alone(engine, made)
    assert together(engine, made) == expected
    monkeypatch.setattr(where, name, fault)
    assert together(engine, made) != expected


@pytest.mark.complete
def test_nothing_is_compiled_once_the_sizes_are_warm(path: Path):
    """200 sequences come and go at random."""
    if "jax" not in BACKENDS:
        pytest.skip("needs a backend that compiles: install phicore-jax")
    engine = engine_of(make_backend("jax"), path)
    engine.scheduler = Scheduler(max_sequences=4)
    rng = random.Random(8)

    def made(count: int) -> list[Callable[[], Request]]:
        found: list[Callable[[], Request]] = []
        for _ in range(count):
            prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 40))]
            options = {"max_tokens": rng.randint(1, 12), "seed": rng.randrange(2**32)}
            sampling = rng.choice([Sampling(), Sampling(temperature=0)])
            found.append(lambda p=prompt, s=sampling, o=options: Request(p, s, **o))  # type: ignore[misc]
        return found

    engine.warm_up([Sampling(), Sampling(temperature=0)])
    compiled: list[str] = []
    engine.runner.steps.progress = lambda what, done, total: compiled.append(what)
    together(engine, made(200), seed=1)
    assert not compiled
