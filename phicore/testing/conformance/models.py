"""Tests of whole models, compared with the protocol's default operations on NumPy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from phicore.backend import Backend
from phicore.engine import Engine, Request
from phicore.gguf.reader import open_gguf
from phicore.network.sampling import Sampling
from phicore.testing import tolerances
from phicore.testing.compare import assert_close
from phicore.testing.conformance.base import EXACT, Conformance, Make
from phicore.testing.reference import Reference
from phicore.testing.tiny_models import Q4_K_M, Tiny, Types, write_model

PHI3 = Tiny(vocab_size=80, max_position_embeddings=400)
MODELS: dict[str, tuple[Tiny, Types]] = {
    "phi3": (PHI3, Q4_K_M),
    "window_partial_rotation_tied": (
        replace(PHI3, sliding_window=6, rope_dimension_count=48, tie_word_embeddings=True),
        Type.Q6_K,
    ),
    "long_rope": (replace(PHI3, original_max_position_embeddings=16), Type.F16),
    "llama": (replace(PHI3, arch="llama"), Q4_K_M),
    "qwen2": (replace(PHI3, arch="qwen2"), Type.Q8_0),
    "phimoe": (replace(PHI3, arch="phimoe", num_local_experts=5), Type.Q4_K),
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=0.9, top_k=30, top_p=0.9, min_p=0.02, repeat_penalty=1.1)


def engine_of(ops: Backend, path: Path) -> Engine:
    with open_gguf(path) as file:
        return Engine.load(ops, file)


def text(engine: Engine, sampling: Sampling, seed: int = 1, limit: int = 24) -> list[int]:
    return list(engine.generate(Request(PROMPT, sampling, max_tokens=limit, seed=seed)))


@dataclass(frozen=True)
class Expected:
    """The results of the reference backend for a model."""

    path: Path
    logits: np.ndarray
    text: list[int]


@cache
def expected(name: str, folder: Path) -> Expected:
    tiny, types = MODELS[name]
    path = write_model(folder / f"{name}.gguf", tiny, types, tokenizer=False)
    engine = engine_of(Reference(), path)
    with np.errstate(all="ignore"):
        return Expected(path, engine.logits(PROMPT), text(engine, DRAWN))


class ModelsConformance(Conformance):
    @pytest.fixture(scope="session")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("models")

    @pytest.fixture(scope="class", params=MODELS)
    @classmethod
    def model(cls, request: pytest.FixtureRequest, folder: Path) -> Expected:
        return expected(request.param, folder)

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, ops: Backend, model: Expected) -> Engine:
        return engine_of(ops, model.path)

    def test_logits_equal_the_reference(self, engine: Engine, model: Expected) -> None:
        assert_close(engine.logits(PROMPT), model.logits, tolerances.FLOAT32_LOGITS)

    def test_seeded_text_equals_the_reference(self, engine: Engine, model: Expected) -> None:
        """Check that a seed gives the same text on every backend."""
        assert text(engine, DRAWN) == model.text

    def test_text_goes_on_when_the_cache_grows(self, ops: Backend, tmp_path: Path) -> None:
        """Generate a text that fills the first capacity, so that the cache grows."""
        path = write_model(tmp_path / "m.gguf", PHI3, Type.F32, tokenizer=False)
        prompt = PROMPT * 12
        engines = [engine_of(Reference(), path), engine_of(ops, path)]
        request = Request(prompt, GREEDY, max_tokens=40)
        both = [list(engine.generate(request)) for engine in engines]
        assert both[1] == both[0]

    def test_two_models_at_a_time_do_not_disturb_each_other(
        self, make: Make, tmp_path: Path
    ) -> None:
        """Run two models in threads of one process, each on a backend of its own."""
        paths = [
            write_model(tmp_path / f"{seed}.gguf", PHI3, Type.Q4_K, seed=seed, tokenizer=False)
            for seed in range(2)
        ]
        engines = []
        for path in paths:
            engines.append(engine_of(make(EXACT), path))
        alone = [text(engine_of(Reference(), path), DRAWN, seed=5) for path in paths]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda e: text(e, DRAWN, seed=5), engines * 3))
        assert found == alone * 3
        assert alone[0] != alone[1]
