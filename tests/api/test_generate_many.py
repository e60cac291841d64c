"""Tests of `Model.generate_many`."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from api.tiny_models import write_tiny

import phicore
from phicore.engine import Request


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[phicore.Model]:
    path = write_tiny(tmp_path_factory.mktemp("m") / "m.gguf")
    with phicore.load(path, "numpy", max_sequences=3) as model:
        yield model


def test_texts_are_those_of_each_alone(model: phicore.Model) -> None:
    requests = [
        model.request(f"Hello {i}", seed=i, max_tokens=4 + 3 * (i % 4), stop="e" if i % 2 else ())
        for i in range(9)
    ]
    expected = [model.generate(request).text() for request in requests]
    ordered = list(model.generate_many(requests, ordered=True))
    assert [answer.index for answer in ordered] == list(range(9))
    assert [answer.text for answer in ordered] == expected
    found = {answer.index: answer.text for answer in model.generate_many(requests)}
    assert found == dict(enumerate(expected))
    assert model.engine.is_idle


def test_request_that_is_refused_stops_no_other(model: phicore.Model) -> None:
    good = model.request("Hello", seed=1, max_tokens=3)
    requests = [good, Request([1] * 5000), good]
    first, refused, last = model.generate_many(requests, ordered=True)
    assert refused.finish_reason == "error"
    assert str(refused.error).startswith("the prompt has 5000 tokens")
    assert first.text == last.text != ""


def test_processor_that_raises_anything_stops_no_other(model: phicore.Model) -> None:
    class Broken(phicore.LogitsProcessor):
        def start(self, prompt: object, vocab_size: int) -> dict[str, np.ndarray]:
            raise ValueError("no state")

        @classmethod
        def apply(cls, ops: Any, logits: Any, state: Any) -> Any:
            return logits

    good = model.request("Hello", seed=1, max_tokens=3)
    broken = model.request("Hello", processors=[Broken()])
    first, failed, last = model.generate_many([good, broken, good], ordered=True)
    assert (failed.finish_reason, str(failed.error)) == ("error", "no state")
    assert first.text == last.text != ""


def test_generation_that_is_closed_before_it_begins_leaves_the_engine(
    model: phicore.Model,
) -> None:
    model.generate("Hello").close()
    with model.generate("Hello"):
        pass
    assert model.engine.is_idle


def test_closed_early_leaves_nothing(model: phicore.Model) -> None:
    answers = model.generate_many(model.request("Hello", max_tokens=5) for _ in range(100))
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    model.engine.step()
    assert model.engine.is_idle


@pytest.mark.complete
def test_memory_does_not_grow_with_the_number_of_requests(model: phicore.Model) -> None:
    def held(count: int) -> int:
        requests = (model.request("Hello", seed=i, max_tokens=2) for i in range(count))
        for answer in model.generate_many(requests):
            del answer
        gc.collect()  # generations are in circles with their iterators
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    before, after = held(20), held(200)
    tracemalloc.stop()
    assert after - before < 20_000


@pytest.mark.parametrize("count", [0, 65, 1.5, "8"])
def test_number_of_sequences_is_checked(count: object) -> None:
    with pytest.raises(phicore.ArgumentError, match=r"^max_sequences: expected 1 to 64"):
        phicore.load("not-looked-for", "numpy", max_sequences=count)  # type: ignore[arg-type]


def test_threads_share_a_model_and_get_the_texts_of_each_alone(model: phicore.Model) -> None:
    requests = [model.request(f"Hello {i}", seed=i, max_tokens=10 + i) for i in range(12)]
    expected = [model.generate(request).text() for request in requests]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda request: model.generate(request).text(), requests))
    assert found == expected
    assert model.engine.is_idle


def test_generation_that_is_left_unfinished_does_not_stop_others(model: phicore.Model) -> None:
    request = model.request("Hello", seed=1, max_tokens=20)
    expected = model.generate(request).text()
    left = model.generate(model.request("Hm", seed=2, max_tokens=100))
    next(left)
    assert model.generate(request).text() == expected
    del left
    gc.collect()
    model.engine.step()
    assert model.engine.is_idle
