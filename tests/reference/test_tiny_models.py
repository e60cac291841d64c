"""Tests of every backend against transformers in float32, on tiny models of every type and shape.

The weights are random. The goldens are made by tools/make_reference.py; tests/golden/README.md says
what they hold.
"""

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from phicore.engine import Request
from phicore.engine.chunks import capacity_of_window
from phicore.errors import ArgumentError
from phicore.network.processors import AnswerPenalty, LogitsProcessor
from phicore.network.sampling import Sampling
from phicore.progress import AGAIN
from phicore.testing import tiny_models
from phicore.testing.compare import assert_close, relative_error
from phicore.testing.conformance.logprobs import log_softmax
from phicore.testing.conformance.models import engine_of
from phicore.testing.tolerances import FLOAT32_LOGITS, SAME_GRAPH

GOLDEN = Path(__file__).parent.parent / "golden" / "phi3.npz"
CASES = {case.name: case for case in tiny_models.cases()}
GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)


@cache
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN))


@pytest.mark.each_value("name", "backend_name")
@pytest.mark.parametrize("name", sorted(CASES))
def test_logits_of_tiny_model_equal_transformers(name, ops, tmp_path):
    path = CASES[name].write(tmp_path / "tiny.gguf")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == str(golden()[f"{name}/sha256"]), "the writer changed: make the goldens again"

    logits = engine_of(ops, path).logits(golden()["token_ids"].tolist())

    assert logits.dtype == np.float32
    assert_close(logits, golden()[f"{name}/logits"], FLOAT32_LOGITS)


@pytest.mark.each_value("name", "backend_name")
@pytest.mark.parametrize("name", ["F32", "mix", "llama", "qwen2", "crosses_original"])
def test_log_probabilities_of_a_prompt_equal_transformers(name, ops, tmp_path):
    ids = golden()["token_ids"].tolist()
    engine = engine_of(ops, CASES[name].write(tmp_path / "tiny.gguf"))
    expected = log_softmax(golden()[f"{name}/logits"])

    scores = engine.score(ids, 20)[1:]

    rows = np.arange(len(ids) - 1)
    assert_close([s.logprob for s in scores], expected[rows, ids[1:]], FLOAT32_LOGITS)
    found = np.array([s.top for s in scores])  # (T - 1, 20, 2)
    assert_close(found[:, :, 1], -np.sort(-expected)[:-1, :20], FLOAT32_LOGITS)


GREEDY_CASES = ("F32", "mix", "llama", "window", "partial_rope", "long_factors", "short_factors")
CROSSING_CASES = ("at_original", "crosses_original")
SCALING_CASES = ("linear_scaling",)

MORE_GREEDY_CASES = ("llama3", "mistral", "qwen2", "phi4_mini", "phimoe", "phimoe_window")


@pytest.mark.each_value("name", "backend_name")
@pytest.mark.parametrize(
    "name", [*GREEDY_CASES, *MORE_GREEDY_CASES, *CROSSING_CASES, *SCALING_CASES]
)
def test_greedy_tokens_of_tiny_model_equal_transformers(name, ops, tmp_path):
    expected = golden()[f"{name}/greedy_ids"].tolist()
    engine = engine_of(ops, CASES[name].write(tmp_path / "tiny.gguf"))

    tokens = engine.generate(
        Request(golden()["token_ids"].tolist(), GREEDY, max_tokens=len(expected), seed=0)
    )

    assert list(tokens) == expected


@pytest.mark.complete
@pytest.mark.each_value("sampling", "backend_name")
@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.3, repeat_penalty=1.2)], ids=["greedy", "drawn"]
)
def test_text_does_not_depend_on_how_long_it_may_become(sampling, ops, tmp_path):
    """An answer grows beyond the original context of 28 when its fifth token is run."""
    engine = engine_of(ops, CASES["crosses_original"].write(tmp_path / "tiny.gguf"))
    prompt = golden()["token_ids"].tolist()
    texts, work = {}, []
    engine.progress = lambda what, done, total: work.append((what, done, total))
    for limit in (3, 4, 5, 6, 8, 20, -1):
        work.clear()
        request = Request(prompt, sampling, max_tokens=limit, seed=3)
        texts[limit] = list(engine.generate(request))
        again = [(done, total) for what, done, total in work if what == AGAIN]
        if limit in (3, 4, 5):  # the last token is never run
            assert not again
        else:
            assert again[0] == (0, 29)
            assert again[-1] == (29, 29)
            assert len(again) == len(set(again))
    assert len(texts[-1]) == engine.context - len(prompt)
    assert all(texts[-1][: len(text)] == text for text in texts.values())


def test_processors_keep_their_state_when_a_text_is_read_again(ops, tmp_path):
    """A state on the device (frequencies) and one from the host (no token of the last three)."""

    class NotAgain(LogitsProcessor):
        needs_tokens = True

        def start(self, prompt, vocab_size):
            self.bias, self.seen = np.zeros(vocab_size, np.float32), []
            return {"bias": self.bias}

        def update(self, token):
            self.seen.append(token)
            bias = self.bias.copy()
            bias[self.seen[-3:]] = -1e9
            return {"bias": bias}

        @classmethod
        def apply(cls, ops, logits, state):
            return logits + state["bias"]

    def frequencies(scores, answer):
        np.subtract.at(scores, answer, 0.5)

    def last_three(scores, answer):
        scores[answer[-3:]] = -1e9

    engine = engine_of(ops, CASES["crosses_original"].write(tmp_path / "tiny.gguf"))
    prompt = golden()["token_ids"].tolist()
    for processor, rule in ((AnswerPenalty(frequency=0.5), frequencies), (NotAgain(), last_three)):
        request = Request(prompt, GREEDY, max_tokens=12, seed=0, processors=[processor])
        answer = list(engine.generate(request))
        for end, token in enumerate(answer):
            scores = engine.logits([*prompt, *answer[:end]])[-1].copy()
            rule(scores, answer[:end])
            assert scores.max() - scores[token] < 1e-4  # the best, or nearly tied with it


def test_long_factors_from_the_beginning(ops, tmp_path):
    engine = engine_of(ops, CASES["crosses_original"].write(tmp_path / "tiny.gguf"))
    prompt = golden()["token_ids"].tolist()
    texts = [
        list(engine.generate(Request(prompt, GREEDY, max_tokens=20, seed=0, rope_factors=factors)))
        for factors in ("auto", "long")
    ]
    longer = [*prompt, *texts[1]]
    best = engine.logits(longer)[len(prompt) - 1 : -1].argmax(axis=1)  # more than 28 tokens: long
    assert texts[1] == best.tolist()
    assert texts[0] != texts[1]
    plain = engine_of(ops, CASES["mix"].write(tmp_path / "plain.gguf"))
    with pytest.raises(ArgumentError, match="rope_factors: this model has one set"):
        plain.add(Request(prompt, rope_factors="long"))


@pytest.mark.complete
@pytest.mark.each_value("name", "backend_name")
@pytest.mark.parametrize("name", ["long_factors", "phimoe_beyond_original"])
def test_conversation_that_crosses_the_original_context_is_read_again(name, ops, tmp_path):
    """The turns of a conversation grow, and the last is beyond the original context of 16."""
    engine = engine_of(ops, CASES[name].write(tmp_path / "tiny.gguf"))
    conversation = golden()["token_ids"].tolist()
    short = engine.logits(conversation[:12])
    for turn in (4, 12):  # 4 + 4 and 12 + 4 tokens are within it
        list(engine.generate(Request(conversation[:turn], GREEDY, max_tokens=4, seed=0)))

    assert_close(engine.logits(conversation), golden()[f"{name}/logits"], FLOAT32_LOGITS)
    assert relative_error(short, golden()[f"{name}/logits"][:12]) > 1e-2  # other rotation
    assert_close(engine.logits(conversation[:12]), short, SAME_GRAPH)


@pytest.mark.complete_where(backend_name="numpy")  # expands the weights for each of the chunks
@pytest.mark.parametrize(
    "sizes",
    [(1, 64), *(pytest.param(sizes, marks=pytest.mark.complete) for sizes in ((1,), (1, 7)))],
    ids=str,
)
def test_logits_far_beyond_the_window_equal_transformers(sizes, ops, tmp_path, monkeypatch):
    """A cache for the window and a chunk is enough for 3000 tokens, read in any chunks."""
    monkeypatch.setattr("phicore.engine.runner.LOGITS_CHUNKS", sizes)
    capacities = []
    for name in ("new_cache", "copy_rows"):
        method = getattr(ops, name)

        def counted(*args, method=method):
            cache = method(*args)
            capacities.append(cache["k"].shape[2])
            return cache

        monkeypatch.setattr(ops, name, counted)
    expected, ids = golden()["windowed/logits"], golden()["windowed/token_ids"].tolist()
    engine = engine_of(ops, tiny_models.windowed().write(tmp_path / "tiny.gguf"))
    assert engine.context > len(ids) > 2000

    assert_close(engine.logits(ids)[-len(expected) :], expected, FLOAT32_LOGITS)

    assert max(capacities) == capacity_of_window(64, ops.capabilities.prompt_chunks[-1])


@pytest.mark.complete
def test_greedy_tokens_far_beyond_the_window_equal_transformers(ops, tmp_path):
    engine = engine_of(ops, tiny_models.windowed().write(tmp_path / "tiny.gguf"))
    ids, expected = (golden()[f"windowed/{name}"].tolist() for name in ("token_ids", "greedy_ids"))
    for count in (len(ids), len(ids) - 1500):  # two layers see 126 tokens back
        tokens = engine.generate(Request(ids[-count:], GREEDY, max_tokens=len(expected), seed=0))
        assert list(tokens) == expected
