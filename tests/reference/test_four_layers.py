"""Tests of four layers of random weights of each type, for errors of `linear` and of the cache.

The reference is the NumPy backend, in float32, which other tests compare with transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, make_backend
from gguf import GGMLQuantizationType as Type

import phicore
from phicore.gguf.quants import AFFINE_TYPES
from phicore.testing import tiny_models
from phicore.testing.compare import assert_close, relative_error
from phicore.testing.tolerances import FLOAT32_LOGITS

TINY = tiny_models.Tiny(num_hidden_layers=4)
LENGTHS = (1, 3, 300)
OTHERS = [name for name in BACKENDS if name != "numpy"]

pytestmark = pytest.mark.skipif("numpy" not in BACKENDS, reason="install phicore-numpy")


@dataclass(frozen=True)
class Expected:
    """A model with the logits and greedy tokens of NumPy, computed once for all backends."""

    path: Path
    logits: list[np.ndarray]
    text: list[int]


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Type], Expected]:
    @cache
    def made(data_type: Type) -> Expected:
        folder = tmp_path_factory.mktemp(data_type.name)
        path = tiny_models.write_model(folder / "model.gguf", TINY, data_type)
        with phicore.load(path, "numpy") as reference:
            logits = [reference.logits(ids) for ids in prompts()]
            return Expected(path, logits, text(reference))

    return made


def text(model: phicore.Model) -> list[int]:
    options = {"max_tokens": 60, "temperature": 0, "repeat_penalty": 1, "ignore_eos": True}
    return [piece.token_id for piece in model.generate(prompts()[2][:40], **options)]


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(TINY.vocab_size, size=n).tolist() for n in LENGTHS]


@pytest.mark.complete
@pytest.mark.each_value("name", "data_type")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("data_type", [*AFFINE_TYPES, Type.F16, Type.BF16], ids=lambda t: t.name)
def test_logits_of_four_layers_equal_float32(
    name: str, data_type: Type, expected: Callable[[Type], Expected]
):
    reference = expected(data_type)
    with phicore.load(reference.path, name) as model:
        for ids, logits in zip(prompts(), reference.logits, strict=True):
            assert_close(model.logits(ids), logits, FLOAT32_LOGITS)


@pytest.mark.complete
@pytest.mark.each_value("name", "data_type")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("data_type", AFFINE_TYPES, ids=lambda t: t.name)
def test_greedy_tokens_of_four_layers_equal_float32(
    name: str, data_type: Type, expected: Callable[[Type], Expected]
):
    reference = expected(data_type)
    with phicore.load(reference.path, name) as model:
        assert text(model) == reference.text


@pytest.mark.parametrize("name", OTHERS)
def test_fast_prefill_is_as_exact_as_bytes_allow_and_faithful_for_one_token(
    name: str, expected: Callable[[Type], Expected]
):
    reference = expected(Type.Q4_K)
    if not make_backend(name).capabilities.has_fast_prefill:
        pytest.skip(f"{name} has no fast prefill on this device")
    with phicore.load(reference.path, name, fast_prefill=True) as fast:
        one, _, many = prompts()
        assert_close(fast.logits(one), reference.logits[0], FLOAT32_LOGITS)
        error = relative_error(fast.logits(many), reference.logits[2])
    assert 1e-4 < error < 1.3e-2  # a smaller error would not be the fast path's
