"""Two models in one process share the threads of the kernels, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from threading import Barrier

import pytest
from api.tiny_models import TINY
from gguf import GGMLQuantizationType as Type

import phicore
from phicore import Model
from phicore.testing.tiny_models import write_model

OTHER = replace(
    TINY, hidden_size=96, intermediate_size=160, num_attention_heads=3, num_key_value_heads=3
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Model]]:
    folder = tmp_path_factory.mktemp("models")
    with ExitStack() as opened:
        yield [
            opened.enter_context(phicore.load(write_model(path, tiny, t), "jax", device="cpu"))
            for path, tiny, t in (
                (folder / "one.gguf", TINY, Type.Q8_0),
                (folder / "other.gguf", OTHER, Type.Q4_1),
            )
        ]


def tokens(model: Model, prompt: str) -> list[int]:
    pieces = model.generate(prompt, max_tokens=60, temperature=0.8, seed=1, ignore_eos=True)
    return [piece.token_id for piece in pieces]


def test_generate_in_two_threads_gives_the_tokens_of_each_alone(models: list[Model]):
    prompts = ["Hello", "the " * 50]  # few rows of activations, and many
    alone = [[tokens(model, prompt) for prompt in prompts] for model in models]
    assert alone[0] != alone[1]
    start = Barrier(2)

    def run(model: Model) -> list[list[list[int]]]:
        start.wait(60)
        return [[tokens(model, prompt) for prompt in prompts] for _ in range(3)]

    with ThreadPoolExecutor(2) as threads:
        for found, expected in zip(threads.map(run, models), alone, strict=True):
            assert found == 3 * [expected]
