"""The decode step, compiled for an H200 without one: what it holds, and how it is launched."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from phicore.testing.tiny_models import Q4_K_M, Tiny, write_model

LAYERS = 3
MODEL = Tiny(
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=LAYERS,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=4096,
    max_position_embeddings=4096,
)
SMALLEST = 4 * 1024 * 1024
"""Bytes of the smallest matrix of a layer, if it were float32."""


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip(
            "needs XLA's compiler for NVIDIA cards: uv run --group ahead-of-time pytest tests/cuda"
        )
    path = write_model(tmp_path_factory.mktemp("m") / "m.gguf", MODEL, Q4_K_M, tokenizer=False)
    program = Path(__file__).with_name("ahead_of_time.py")
    done = subprocess.run(
        [sys.executable, str(program), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_products_and_attention_are_kernels(step: dict[str, Any]):
    once = dict.fromkeys(("store", "attention", "combine"), LAYERS)
    products = 4 * LAYERS + 1
    assert step["kernels"] == {"product": products, "quantize": products, **once}


def test_a_layer_takes_few_launches(step: dict[str, Any]):
    """17 each; the rest is what comes before the first, and the sampler."""
    launches = re.findall(r"kCustomKernel|kKernel", step["thunks"]["thunk_sequence"])
    assert len(launches) <= 17 * LAYERS + 20


def test_weights_are_in_memory_as_in_the_file(step: dict[str, Any]):
    weights = LAYERS * (4 * 1024 * 1024 + 3 * 2048 * 1024) + 2 * 4096 * 1024
    assert step["weight_bytes"] * 8 / weights < 5.6  # Q4_K to Q6_K


def test_no_weight_is_expanded(step: dict[str, Any]):
    assert step["temp_bytes"] < SMALLEST


def test_cache_is_written_in_place(step: dict[str, Any]):
    assert step["alias_bytes"] == step["cache_bytes"]
    assert step["copies"] == []


def test_step_is_one_command_buffer(step: dict[str, Any]):
    """A single launch: XLA calls a CUDA graph so."""
    thunks = step["thunks"]["thunk_sequence_after_thunk_passes"]
    top = [line for line in thunks.splitlines() if re.match(r"\d+: ", line)]
    assert [line.split()[1] for line in top] == ["kCommandBuffer"]
