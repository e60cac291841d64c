"""Tests of whole models with GPU kernels, run on the CPU, against the defaults on NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from phicore.testing.compare import relative_error
from phicore.testing.conformance.models import DRAWN, PROMPT, Reference, engine_of, text
from phicore.testing.tiny_models import Q4_K_M, Tiny, write_model

pytest.importorskip("jax", reason="install phicore-jax")
pytest.importorskip("llvmlite", reason="install llvmlite, for the kernels of JAX")

from cuda import host
from phicore_jax.backend import JaxBackend
from phicore_jax.cuda import runtime

from phicore.backend import BackendOptions

TINY = Tiny(
    hidden_size=256,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=80,
    max_position_embeddings=400,
)
MODELS = {
    "q4_k_m": (TINY, Q4_K_M),
    "window": (replace(TINY, sliding_window=7), Type.Q4_1),
    "experts": (replace(TINY, arch="phimoe", num_local_experts=3), Type.Q3_K),
}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., JaxBackend]:
    """Return a function that makes a backend whose GPU kernels run on the CPU."""
    monkeypatch.setattr(runtime, "launch", host.launch)
    monkeypatch.setattr(runtime, "launch_in_place", host.launch_in_place)

    def made(**options: Any) -> JaxBackend:
        chosen = BackendOptions(device="cpu", **options)
        return JaxBackend(chosen, kernels=runtime.CudaKernels(), steps=4)

    return made


@pytest.mark.parametrize(
    ("name", "cache_type"),
    [
        pytest.param("q4_k_m", "i16", marks=pytest.mark.complete),
        pytest.param("q4_k_m", "f16", marks=pytest.mark.complete),
        pytest.param("q4_k_m", "f32", marks=pytest.mark.complete),
        pytest.param("window", "i16", marks=pytest.mark.complete),
        pytest.param("experts", "i16", marks=pytest.mark.complete),
    ],
)
def test_logits_and_text_are_those_of_the_reference(
    make: Callable[..., JaxBackend], tmp_path: Path, name: str, cache_type: str
):
    ops = make(cache_type=cache_type)
    tiny, types = MODELS[name]
    path = write_model(tmp_path / "m.gguf", tiny, types, tokenizer=False)
    engine, reference = engine_of(ops, path), engine_of(Reference(), path)
    with np.errstate(all="ignore"):
        logits = reference.logits(PROMPT)
        expected = text(reference, DRAWN, limit=10)
    bound = 1e-3 if cache_type == "f16" else 2e-4  # errors of larger models are smaller
    assert relative_error(engine.logits(PROMPT), logits) < bound
    singles = [engine.logits(PROMPT[:1]), reference.logits(PROMPT[:1])]
    assert relative_error(*singles) < bound
    if cache_type != "f16":
        assert text(engine, DRAWN, limit=10) == expected


def test_fast_prefill_is_as_exact_as_it_says(make: Callable[..., JaxBackend], tmp_path: Path):
    ops = make(fast_prefill=True)
    path = write_model(tmp_path / "m.gguf", TINY, Q4_K_M, tokenizer=False)
    logits = engine_of(Reference(), path).logits(PROMPT)
    error = relative_error(engine_of(ops, path).logits(PROMPT), logits)
    assert 1e-5 < error < 2e-3
