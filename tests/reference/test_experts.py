"""Tests of a deep model of experts. Backends may decide near-ties of the router differently."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from phicore.backend import Backend
from phicore.testing.compare import relative_error
from phicore.testing.conformance.models import Reference, engine_of
from phicore.testing.tiny_models import Tiny, write_model

DEEP = Tiny(
    arch="phimoe",
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=8,
    num_local_experts=16,
    vocab_size=80,
)
TOKENS = np.random.default_rng(3).integers(0, 80, 300).tolist()


@cache
def expected(folder: Path) -> tuple[Path, np.ndarray]:
    path = write_model(folder / "deep.gguf", DEEP, Type.Q4_K, tokenizer=False)
    with np.errstate(all="ignore"):
        return path, engine_of(Reference(), path).logits(TOKENS)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.mark.complete
def test_logits_of_a_deep_model_of_experts(ops: Backend, folder: Path):
    path, theirs = expected(folder)
    ours = engine_of(ops, path).logits(TOKENS)
    errors = np.array([relative_error(a, b) for a, b in zip(ours, theirs, strict=True)])
    assert np.median(errors) < 1e-4
    assert (errors > 1e-2).mean() <= 0.02  # tokens with other experts, and some that see them
