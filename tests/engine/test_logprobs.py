"""Log probabilities: their figures, that the text stays the same, and who gets them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, make_backend

from phicore.backend import Backend
from phicore.engine import Engine, Request, Sequence
from phicore.engine.scheduler import Scheduler
from phicore.engine.sequence import Output
from phicore.errors import ArgumentError, ContextError, PhicoreError
from phicore.network import logprobs, sampler
from phicore.network.processors import LogitBias
from phicore.network.sampling import Sampling
from phicore.testing import tiny_models
from phicore.testing.conformance.logprobs import log_softmax
from phicore.testing.conformance.models import PHI3, PROMPT, engine_of
from phicore.testing.tiny_models import Type, write_model
from phicore.text.logprobs import TokenLogprobs

pytestmark = pytest.mark.as_for_users("jax")  # whose steps give the same bits
NEAR = {"rtol": 0, "atol": 2e-4}
"""The tolerance for steps of one token beside steps of many, on kernels that round activations."""
DRAWN = Sampling(temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, repeat_penalty=1.2)
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("m") / "m.gguf", PHI3, Type.Q4_K, tokenizer=False)


@pytest.fixture(scope="module")
def engine(ops: Backend, path: Path) -> Engine:
    return engine_of(ops, path)


def found(engine: Engine, request: Request) -> tuple[list[int], list[TokenLogprobs]]:
    outputs = list(engine.outputs(engine.add(request)))
    assert all(len(o.logprobs) in (0, len(o.tokens)) for o in outputs)
    return [t for o in outputs for t in o.tokens], [p for o in outputs for p in o.logprobs]


def check(likely: TokenLogprobs, scores: np.ndarray, count: int) -> None:
    """Compare the log probabilities of a token with those of the scores (V,)."""
    expected = log_softmax([scores])[0]
    assert np.allclose(likely.logprob, expected[likely.token], **NEAR)
    ids, figures = [id for id, _ in likely.top], [figure for _, figure in likely.top]
    assert len(ids) == len(set(ids)) == count
    assert np.allclose(figures, expected[ids], **NEAR)
    assert np.allclose(figures, -np.sort(-expected)[:count], **NEAR)
    assert likely.top == tuple(sorted(likely.top, key=lambda pair: (-pair[1], pair[0])))
    assert dict(likely.top).get(likely.token, likely.logprob) == likely.logprob


# ---- the figures -----------------------------------------------------------------------------


@pytest.mark.each_value("sampling", "backend_name")
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_figures_are_the_log_softmax_of_the_logits(engine: Engine, sampling: Sampling):
    """The logits come before the penalty, the bias, the temperature and the filters."""
    bias = LogitBias({5: 4.0, 7: -1e9})
    request = Request(PROMPT, sampling, max_tokens=12, seed=4, logprobs=20, processors=[bias])
    tokens, likely = found(engine, request)
    assert [each.token for each in likely] == tokens
    scores = engine.logits([*PROMPT, *tokens])
    for place, each in enumerate(likely):
        check(each, scores[len(PROMPT) - 1 + place], 20)


@pytest.mark.each_value("count", "backend_name")
@pytest.mark.parametrize("count", [0, 1, 7])
def test_there_are_as_many_alternatives_as_asked_for(engine: Engine, count: int):
    request = Request(PROMPT, DRAWN, max_tokens=4, seed=4)
    _, all_of_them = found(engine, replace(request, logprobs=20))
    _, some = found(engine, replace(request, logprobs=count))
    assert some == [replace(each, top=each.top[:count]) for each in all_of_them]


def test_there_are_none_if_nobody_asks(engine: Engine):
    tokens, likely = found(engine, Request(PROMPT, DRAWN, max_tokens=4, seed=4))
    assert (len(tokens), likely) == (4, [])


@pytest.mark.parametrize("count", [-1, 21, 1.0, True, "3"])
def test_number_of_alternatives_is_checked(engine: Engine, count: Any):
    with pytest.raises(ArgumentError, match=r"^logprobs: expected 0 to 20, got "):
        Request([1], logprobs=count)
    with pytest.raises(ArgumentError, match=r"^logprobs: expected 0 to 20, got "):
        engine.score([1, 2], count)


def test_vocabulary_that_is_smaller_than_the_number_of_alternatives(tmp_path: Path):
    tiny = replace(PHI3, vocab_size=11)
    engine = engine_of(
        make_backend("numpy"), write_model(tmp_path / "m.gguf", tiny, Type.F32, tokenizer=False)
    )
    tokens, likely = found(engine, Request([1, 2], GREEDY, max_tokens=2, logprobs=20))
    scores = engine.logits([1, 2, *tokens])
    for place, each in enumerate(likely):
        check(each, scores[1 + place], 11)


# ---- the text stays the same -----------------------------------------------------------------


def requests(count: int) -> list[Request]:
    rng = random.Random(count)
    return [
        Request(
            [rng.randrange(80) for _ in range(rng.randint(1, 30))],
            rng.choice([GREEDY, DRAWN, Sampling(temperature=1.0, top_k=0, top_p=1, min_p=0)]),
            max_tokens=rng.randint(1, 20),
            seed=rng.randrange(2**64),
        )
        for _ in range(count)
    ]


def together(engine: Engine, made: list[Request]) -> list[Sequence]:
    sequences = [engine.add(request) for request in made]
    while not engine.is_idle:
        engine.step()
    return sequences


@pytest.mark.complete_where(backend_name="jax")
def test_texts_do_not_depend_on_who_asks(engine: Engine):
    plain = requests(7)
    expected = [sequence.answer for sequence in together(engine, plain)]
    for asking in ({0, 1, 2, 3, 4, 5, 6}, {2, 5}):
        made = [replace(r, logprobs=5) if n in asking else r for n, r in enumerate(plain)]
        sequences = together(engine, made)
        assert [sequence.answer for sequence in sequences] == expected
        for number, sequence in enumerate(sequences):
            likely = [each for output in sequence.outputs for each in output.logprobs]
            assert len(likely) == (len(expected[number]) if number in asking else 0)
            scores = engine.logits([*plain[number].prompt_ids, *expected[number]])
            first = len(plain[number].prompt_ids) - 1
            for place, each in enumerate(likely):
                assert each.token == expected[number][place]
                check(each, scores[first + place], 5)


def test_everything_that_a_step_computes_is_the_same_to_the_last_bit(ops: Backend, path: Path):
    """The keys and values of the whole text tell of every hidden state."""
    kept = []
    for count in (None, 20):
        engine = engine_of(ops, path)
        engine.prefixes.most_bytes = 10**8
        request = Request([*PROMPT, *PROMPT], DRAWN, max_tokens=30, seed=2, logprobs=count)
        tokens, _ = found(engine, request)
        prefix = engine.prefixes.longest([*request.prompt_ids, *tokens])
        assert prefix is not None
        size = len(prefix.tokens)
        assert size > len(PROMPT) * 2
        layers = prefix.cache.layers
        kept.append([ops.to_numpy(a)[:, :, :size] for layer in layers for a in layer.values()])
    for plain, asked in zip(*kept, strict=True):
        assert plain.tobytes() == asked.tobytes()


def test_samples_of_a_large_vocabulary_are_the_same(ops: Backend):
    """A compiler may divide long sums otherwise where somebody else reads the logits, too.

    The temperature is high, so that the drawn tokens depend on the bound of top-p.
    """
    batch, size, rng = 4, 49_152, np.random.default_rng(0)

    def sample(logits: Any, penalty: Any, draw: Any) -> Any:
        return sampler.sample(ops, logits, penalty, draw), None

    def both(logits: Any, penalty: Any, draw: Any) -> Any:
        token = sampler.sample(ops, logits, penalty, draw)
        return token, logprobs.logprobs(ops, logits, token)

    rows = np.ones(batch, np.float32)
    penalty = {
        "recent": np.full((batch, 64), 7, np.int32),
        "last_n": np.full(batch, 64, np.int32),
        "repeat_penalty": rows * np.float32(1.1),
    }
    filters = {"top_k": np.zeros(batch, np.int32), "top_p": rows / 2, "min_p": rows * 0}
    compiled = [ops.compile(function) for function in (sample, both)]
    for step in range(25):
        logits = rng.normal(size=(batch, size)).astype(np.float32) * 2
        uniforms = np.stack([sampler.uniforms(row, step, size) for row in range(batch)])
        draw = {"temperature": rows * np.float32(1.5), "uniforms": uniforms, **filters}
        given = [
            ops.asarray(logits),
            *({name: ops.asarray(a) for name, a in host.items()} for host in (penalty, draw)),
        ]
        plain, asked = (ops.to_numpy(function(*given)[0]) for function in compiled)
        assert plain.tolist() == asked.tolist()


@pytest.mark.parametrize("name", [name for name in ("numpy", "jax") if name in BACKENDS])
def test_calls_of_several_steps_have_the_same(name: str, path: Path):
    engines = []
    for steps in (1, 4):
        ops = make_backend(name)
        ops.capabilities = replace(ops.capabilities, steps=steps)
        engines.append(engine_of(ops, path))
    for sampling in (GREEDY, DRAWN):
        for limit in (1, 3, 11):
            request = Request(PROMPT, sampling, max_tokens=limit, seed=7, logprobs=4)
            one, many = (found(engine, request) for engine in engines)
            assert one[0] == many[0] == found(engines[1], replace(request, logprobs=None))[0]
            assert [each.token for each in many[1]] == many[0]
            for alone, other in zip(one[1], many[1], strict=True):
                assert [id for id, _ in alone.top] == [id for id, _ in other.top]
                figures = [[each.logprob, *(x for _, x in each.top)] for each in (alone, other)]
                assert np.allclose(*figures, **NEAR)


def test_end_token_has_one_too(engine: Engine):
    request = Request(PROMPT, DRAWN, max_tokens=12, seed=4, logprobs=2)
    tokens, likely = found(engine, request)
    end = tokens[5]
    ended = found(engine, replace(request, ends=frozenset({end})))
    count = tokens.index(end) + 1
    assert ended == (tokens[:count], likely[:count])


@pytest.mark.complete
def test_nothing_is_compiled_once_steps_with_them_are_warm(path: Path):
    if "jax" not in BACKENDS:
        pytest.skip("needs a backend that compiles: install phicore-jax")
    engine = engine_of(make_backend("jax"), path)
    engine.scheduler = Scheduler(max_sequences=4)
    engine.warm_up([DRAWN, GREEDY], has_logprobs=True)
    compiled: list[str] = []
    engine.runner.steps.progress = lambda what, done, total: compiled.append(what)
    rng = random.Random(1)
    made = [
        Request(PROMPT[: rng.randint(1, 20)], s, max_tokens=rng.randint(1, 9), seed=1, logprobs=n)
        for s in (DRAWN, GREEDY)
        for n in [None, None, 0, 5, 20, None, 3]
    ]
    together(engine, made)
    assert not compiled


# ---- prompts ---------------------------------------------------------------------------------

CASES = {case.name: case for case in tiny_models.cases()}


@pytest.mark.each_value("name", "backend_name")
@pytest.mark.parametrize("name", ["mix", "llama", "window", "crosses_original"])
def test_scores_of_a_prompt_are_the_log_softmax_of_the_logits(
    name: str, ops: Backend, tmp_path: Path
):
    engine = engine_of(ops, CASES[name].write(tmp_path / "m.gguf"))
    for length in (1, 2, 29, 70):
        ids = np.random.default_rng(length).integers(0, 80, min(length, engine.context)).tolist()
        scores = engine.logits(ids)
        first, *others = engine.score(ids, 6)
        assert first is None
        assert [each.token for each in others if each] == ids[1:]
        for place, each in enumerate(others):
            assert each is not None
            check(each, scores[place], 6)


def test_scores_hold_no_logits_of_all_tokens(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each array that comes to the host has one number, or 20, for a token."""
    engine = engine_of(make_backend("numpy"), path)
    to_numpy, shapes = engine.runner.ops.to_numpy, []

    def seen(array: Any) -> np.ndarray:
        shapes.append(array.shape)
        return to_numpy(array)

    monkeypatch.setattr(engine.runner.ops, "to_numpy", seen)
    engine.score([1] * 150)
    assert set(shapes) == {(1, n, *rest) for n in (64, 22) for rest in ((), (20,))}


def test_steps_are_run_between_the_parts_of_a_text_that_is_scored(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A client that had prompts scored kept all others waiting for minutes."""
    engine = engine_of(make_backend("numpy"), path)
    request, ids = Request(PROMPT, max_tokens=6), [1] * 150
    answer, scores = list(engine.generate(request)), engine.score(ids)
    steps: list[list[Output]] = []

    class Pausing:
        """Stands for the module `time`: while a thread sleeps, another one runs a step."""

        @staticmethod
        def sleep(seconds: float) -> None:
            steps.append(engine.step())

    monkeypatch.setattr("phicore.engine.engine.time", Pausing)
    sequence = engine.add(request)
    assert engine.score(ids) == scores
    assert len(steps) == 3
    assert [token for output in engine.outputs(sequence) for token in output.tokens] == answer


@pytest.mark.parametrize(
    ("ids", "error"),
    [([], ArgumentError), ([80], ArgumentError), ([-1], ArgumentError), ([1] * 401, ContextError)],
    ids=lambda value: str(value)[:12],
)
def test_tokens_that_cannot_be_scored_are_refused(
    engine: Engine, ids: list[int], error: Callable[..., Any]
):
    with pytest.raises(error):  # type: ignore[call-overload]
        engine.score(ids)


def test_scores_that_are_no_numbers_are_an_error(ops: Backend, path: Path):
    engine = engine_of(ops, path)
    params = dict(engine.runner.params)
    norm = next(name for name in params if "norm" in name)
    broken = np.full(engine.runner.config.hidden_size, np.nan, np.float32)
    engine.runner.weights.forms = {**params, norm: ops.asarray(broken)}
    with pytest.raises(PhicoreError, match="scores are not finite numbers: the file"):
        engine.score([5, 6, 7])
