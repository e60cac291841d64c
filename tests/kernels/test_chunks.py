"""Tests of whole models' bits: logits do not depend on the chunks in which a text is read."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from kernels.made import kernels_of
from phicore_jax.backend import JaxBackend
from phicore_jax.kernels.build import supported_targets

from phicore.backend import BackendOptions
from phicore.backend.shapes import BLOCK_OF_SLOTS
from phicore.engine.cache import Cache
from phicore.engine.runner import Runner
from phicore.testing.conformance.models import engine_of
from phicore.testing.tiny_models import Q4_K_M, Tiny, Type, Types, write_model

PHI3 = Tiny(vocab_size=80)
MODELS: dict[str, tuple[Tiny, Types]] = {
    "phi3": (PHI3, Q4_K_M),
    "window": (replace(PHI3, sliding_window=40), Type.F32),
    "partial_rotation": (replace(PHI3, rope_dimension_count=48, sliding_window=70), Type.Q6_K),
    "phimoe": (
        replace(PHI3, arch="phimoe", num_local_experts=16, intermediate_size=256),
        Type.Q4_K,
    ),
    "qwen2": (replace(PHI3, arch="qwen2", num_attention_heads=16), Type.Q8_0),
}
SIZES = ([16], [64], [5, 1, 33, 64, 2, 16])
TOKENS = np.random.default_rng(0).integers(0, PHI3.vocab_size, 300, np.int32)


def logits(runner: Runner, sizes: list[int]) -> tuple[np.ndarray, int]:
    """Read the text in chunks of some sizes, in turn.

    Returns:
        The logits (T, V), and the number of slots that were freed.
    """
    asarray, cache = runner.ops.asarray, runner.new_cache(len(TOKENS))
    rows: list[np.ndarray] = []
    start = 0
    for size in cycle(sizes):
        ids = TOKENS[None, start : start + size]
        if ids.size == 0:
            return np.concatenate(rows), int(cache.first[0])
        end = start + ids.size
        runner.make_room(cache, np.array([start], np.int32), ids.size)
        places = np.arange(start, end, dtype=np.int32)[None]
        cache.layers, scores = runner.steps.run(
            runner.steps.score(),
            cache,
            runner.tables.until(end, is_long=False),
            (asarray(ids), asarray(places)),
        )
        rows.append(runner.ops.to_numpy(scores)[0])
        start = end
    raise AssertionError("a cycle does not end")


@pytest.mark.complete
@pytest.mark.each_value("name", "target")
@pytest.mark.parametrize("target", supported_targets())
@pytest.mark.parametrize("name", MODELS)
def test_logits_have_the_same_bits_in_chunks_of_any_size(name: str, target: str, tmp_path: Path):
    path = write_model(tmp_path / "m.gguf", *MODELS[name], tokenizer=False)
    ops = JaxBackend(BackendOptions(device="cpu"), kernels=kernels_of(target))
    # small chunks leave a small cache, whose slots are freed several times
    ops.capabilities = replace(ops.capabilities, prompt_chunks=(1, 16, 64))
    runner = engine_of(ops, path).runner
    expected, freed = logits(runner, [1])
    assert freed % BLOCK_OF_SLOTS == 0
    assert (freed > 0) == (MODELS[name][0].sliding_window is not None)
    for sizes in SIZES:
        found, _ = logits(runner, sizes)
        assert found.tobytes() == expected.tobytes(), sizes


@pytest.mark.each_value("name", "target")
@pytest.mark.parametrize("target", supported_targets())
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_row_have_the_same_bits_alone_and_among_others(
    name: str, target: str, tmp_path: Path
):
    """Rows of five texts, of other lengths, in one step."""
    path = write_model(tmp_path / "m.gguf", *MODELS[name], tokenizer=False)
    ops = JaxBackend(BackendOptions(device="cpu"), kernels=kernels_of(target))
    runner = engine_of(ops, path).runner
    asarray, counts = ops.asarray, [1, 7, 30, 31, 38]

    def step(cache: Cache, starts: list[int], tokens: list[int]) -> np.ndarray:
        cache.layers, scores = runner.steps.run(
            runner.steps.score(),
            cache,
            runner.tables.until(64, is_long=False),
            (asarray(np.int32(tokens)[:, None]), asarray(np.int32(starts)[:, None])),
        )
        return ops.to_numpy(scores)[:, 0]

    caches, expected = [], []
    for count in counts:
        cache = runner.new_cache(64)
        for position in range(count):
            before = runner.copy(cache, [0], np.array([position]))
            scores = step(cache, [position], [int(TOKENS[position + count])])
        caches.append(before)
        expected.append(scores)
    together = runner.copy(caches[0], [0] * len(counts), np.array([0] * len(counts)))
    for row, cache in enumerate(caches):
        layers = runner.steps.insert(together.layers, cache.layers, row, counts[row] - 1)
        together = together.with_row(layers, row, cache)
    last = [int(TOKENS[2 * count - 1]) for count in counts]
    found = step(together, [count - 1 for count in counts], last)
    assert found.tobytes() == np.concatenate(expected).tobytes()
