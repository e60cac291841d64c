"""Tests of steps compiled for an H200 and a T4 without a GPU: kernels, memory and launches."""

from __future__ import annotations

import importlib.util
import json
import math
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
"""Bytes of the smallest matrix of a layer when expanded to float32."""
ONCE = dict.fromkeys(("store", "attention", "combine"), LAYERS)
PRODUCTS = 4 * LAYERS + 1
MADE = {"quantize_normed": 2 * LAYERS, "quantize_gated": LAYERS, "quantize": LAYERS + 1}
KERNELS = {"product": PRODUCTS, **MADE, **ONCE, "uniforms": 1}


Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip(
            "needs XLA's compiler for NVIDIA GPUs: uv run --group ahead-of-time pytest tests/cuda"
        )
    path = write_model(tmp_path_factory.mktemp("m") / "m.gguf", MODEL, Q4_K_M, tokenizer=False)
    program = Path(__file__).with_name("ahead_of_time.py")
    done = subprocess.run(
        [sys.executable, str(program), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["step", "steps", "shared_step"])
def decode(request: pytest.FixtureRequest, found: dict[str, Found]) -> Found:
    return found[request.param]


def launches(program: Found) -> list[str]:
    """List the kinds of launches that the host makes.

    XLA indents what is inside a loop or a command buffer, so this leaves it out.
    """
    thunks = program["thunks"]["thunk_sequence_after_thunk_passes"]
    return re.findall(r"^\d+: (\w+)", thunks, re.MULTILINE)


# ---- a token ---------------------------------------------------------------------------------


def test_products_and_attention_are_kernels(decode: Found):
    assert decode["kernels"] == KERNELS


def test_weights_are_in_memory_as_in_the_file(decode: Found):
    weights = LAYERS * (4 * 1024 * 1024 + 3 * 2048 * 1024) + 2 * 4096 * 1024
    assert decode["weight_bytes"] * 8 / weights < 5.6  # Q4_K to Q6_K


def test_no_weight_is_expanded(decode: Found):
    assert decode["temp_bytes"] < SMALLEST


def test_cache_is_written_in_place(found: dict[str, Found]):
    for name in ("step", "steps", "prompt"):
        assert found[name]["alias_bytes"] == found[name]["cache_bytes"]
    shared = found["shared_step"]
    assert shared["alias_bytes"] == shared["cache_bytes"] // 2  # the cache of each device
    for name in ("step", "shared_step"):
        assert found[name]["copies"] == []
    # The loop copies nothing larger than ids and positions.
    assert max(map(elements, found["steps"]["copies"])) <= 64


def elements(line: str) -> int:
    """Return the number of elements of an HLO instruction's result."""
    shape = re.search(r"= \w+\[([\d,]*)\]", line)
    assert shape is not None, line
    return math.prod(int(n) for n in shape[1].split(",") if n)


def test_layer_takes_few_launches(found: dict[str, Found]):
    """A layer takes up to 14 launches, and everything outside of the layers up to 20."""
    thunks = re.findall(r"kCustomKernel|kKernel", found["step"]["thunks"]["thunk_sequence"])
    assert len(thunks) <= 14 * LAYERS + 20


def test_step_is_one_command_buffer(found: dict[str, Found]):
    """The host makes a single launch, of a CUDA graph, which XLA calls a command buffer."""
    assert launches(found["step"]) == ["kCommandBuffer"]


def test_several_steps_are_one_command_buffer_with_their_loop(found: dict[str, Found]):
    """The loop is in the command buffer, so the host does not wait between steps."""
    assert launches(found["steps"]) == ["kCommandBuffer"]
    thunks = found["steps"]["thunks"]["thunk_sequence_after_thunk_passes"]
    assert len(re.findall(r"^    \d+: kWhile", thunks, re.MULTILINE)) == 1


def test_step_that_two_cards_share_is_one_command_buffer_with_two_sums_a_layer(
    found: dict[str, Found],
):
    shared = found["shared_step"]
    assert launches(shared) == ["kCommandBuffer"]
    assert shared["sums"] == 2 * LAYERS


@pytest.mark.parametrize("name", ["logprobs", "logprobs_steps"])
def test_step_with_log_probabilities_is_one_command_buffer(found: dict[str, Found], name: str):
    """The step has the same kernels, and XLA computes the log probabilities with few launches."""
    assert found[name]["kernels"] == KERNELS
    assert launches(found[name]) == ["kCommandBuffer"]
    if name == "logprobs":
        counts = [
            len(re.findall(r"kCustomKernel|kKernel", found[n]["thunks"]["thunk_sequence"]))
            for n in ("step", name)
        ]
        assert counts[1] - counts[0] <= 30


def test_card_before_ampere_has_the_same_step(found: dict[str, Found]):
    assert found["old_step"]["kernels"] == KERNELS
    assert launches(found["old_step"]) == ["kCommandBuffer"]


@pytest.mark.parametrize("gpu", ["", "old_"])
def test_kernels_are_tried_in_the_way_in_which_they_are_used(found: dict[str, Found], gpu: str):
    """The trials run in a loop inside of a command buffer, as steps do."""
    trials = [found[f"{gpu}try_{name}"] for name in ("products", "experts", "others")]
    assert [launches(trial) for trial in trials] == [["kCommandBuffer"]] * 3
    tried = {name for trial in trials for name in trial["kernels"]}
    assert tried == {*KERNELS, "expand", "expert_product", "expert_expand"}


# ---- a prompt --------------------------------------------------------------------------------


def test_weights_are_expanded_a_part_at_a_time(found: dict[str, Found]):
    """A part is 4 MiB here, with three bfloat16 for a weight.

    This is 512 rows, or 256 rows of `down_proj`.
    """
    prompt = found["prompt"]
    parts = 6 + 2 + 8 + 4
    # The output matrix is multiplied by the last token alone.
    once = {"product": 1, "quantize": 1, "uniforms": 1}
    assert prompt["kernels"] == {"expand": parts * LAYERS, **once}
    gate_up = 3 * 2 * 2 * 2048 * 1024
    assert prompt["temp_bytes"] < gate_up  # mostly attention scores
    assert found["old_prompt"]["kernels"] == prompt["kernels"]
