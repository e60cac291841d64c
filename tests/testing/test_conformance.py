"""Tests of the conformance kit: a correct backend passes, and each planted fault is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from phicore_numpy.backend import NumpyBackend

from phicore.backend import Array, Backend, BackendOptions, LayerCache, Weight
from phicore.errors import PhicoreError
from phicore.gguf.matrix import Matrix
from phicore.testing import runner


class RopeOfNeighbours(NumpyBackend):
    """A backend that rotates channels 2i and 2i + 1 together, as other models do."""

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        r, y = cos.shape[-1], np.array(x)
        a, b = x[..., 0 : 2 * r : 2], x[..., 1 : 2 * r : 2]
        c, s = cos[:, :, None], sin[:, :, None]
        y[..., 0 : 2 * r : 2], y[..., 1 : 2 * r : 2] = a * c - b * s, b * c + a * s
        return y


class RopeOtherWay(NumpyBackend):
    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        return super().rope(x, cos, -sin)


class MaskWithoutSelf(NumpyBackend):
    """A backend in which a token does not attend to itself, except for the first token."""

    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        return super().attention(q, cache, np.maximum(slots - 1, 0), scale, window)


class WindowOneWider(NumpyBackend):
    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        return super().attention(q, cache, slots, scale, None if window is None else window + 1)


class HalfPrecisionAttention(NumpyBackend):
    """A backend whose attention returns results rounded to float16."""

    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        y = super().attention(q, cache, slots, scale, window)
        return y.astype(np.float16).astype(np.float32)


class AttentionWithoutScale(NumpyBackend):
    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        return super().attention(q, cache, slots, 1.0, window)


class KeysOfTheNextHead(NumpyBackend):
    """A backend that assigns key heads to query heads in turn instead of in groups."""

    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        heads, kv_heads = q.shape[1], cache["k"].shape[1]
        order = np.arange(heads).reshape(-1, kv_heads).T.ravel()
        y = super().attention(q[:, order], cache, slots, scale, window)
        return y[:, np.argsort(order)]


class DroppedScales(NumpyBackend):
    """A backend that gives every Q4_0 block of a row the scale of the first block."""

    def load_weight(self, matrix: Matrix) -> Weight:
        data = [np.array(part.data) for part in matrix.parts]
        for rows, part in zip(data, matrix.parts, strict=True):
            if part.type.name == "Q4_0":  # blocks of 18 bytes, of which the first two are the scale
                blocks = rows.reshape(len(rows), -1, 18)
                blocks[:, :, :2] = blocks[:, :1, :2]
        parts = [replace(p, data=d) for p, d in zip(matrix.parts, data, strict=True)]
        return super().load_weight(replace(matrix, parts=tuple(parts)))


class UpBeforeGate(NumpyBackend):
    def swiglu(self, gate_up: Array) -> Array:
        return super().swiglu(np.concatenate(np.split(gate_up, 2, axis=-1)[::-1], axis=-1))


class FusedGateUpBeforeGate(NumpyBackend):
    def swiglu_linear(self, gate_up: Array, weight: Weight) -> Array:
        swapped = np.concatenate(np.split(gate_up, 2, axis=-1)[::-1], axis=-1)
        return super().swiglu_linear(swapped, weight)


class FusedNormWithoutWeight(NumpyBackend):
    def rms_norm_linear(self, x: Array, norm: Array, eps: float, weight: Weight) -> Array:
        return super().rms_norm_linear(x, np.ones_like(norm), eps, weight)


class NormWithoutEpsilon(NumpyBackend):
    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return super().rms_norm(x, weight, 1e-12)


class CacheOneLate(NumpyBackend):
    """A backend that writes new positions one slot too late, if the cache has such a slot."""

    def update_cache(self, cache: LayerCache, k: Array, v: Array, slots: Array) -> LayerCache:
        last = cache["k"].shape[2] - 1
        return super().update_cache(cache, k, v, np.minimum(slots + 1, last))


class ExpertsByRank(NumpyBackend):
    """A backend that chooses each row's expert by the row's position."""

    def expert_linear(self, x: Array, experts: Array, weight: Weight) -> Array:
        return super().expert_linear(x, np.arange(len(experts)) % len(weight), weight)


class KeepsTheHostsMemory(NumpyBackend):
    def asarray(self, x: np.ndarray) -> Array:
        return np.asarray(x)


class SharedState(NumpyBackend):
    """A backend whose instances all use the first instance's weights of a name."""

    weights: dict[str, Weight] = {}  # noqa: RUF012

    def load_weight(self, matrix: Matrix) -> Weight:
        key = f"{matrix.name} {matrix.shape}"
        if matrix.name.startswith("blk."):
            return self.weights.setdefault(key, super().load_weight(matrix))
        return super().load_weight(matrix)


FAULTS = {
    RopeOfNeighbours: "test_rope_equals_complex_rotation",
    RopeOtherWay: "test_rope_equals_complex_rotation",
    MaskWithoutSelf: "test_attention_",
    WindowOneWider: "test_attention_",
    HalfPrecisionAttention: "test_attention_",
    AttentionWithoutScale: "test_attention_",
    KeysOfTheNextHead: "test_attention_",
    DroppedScales: "test_linear_and_embedding_one_part_equal_float64[Q4_0]",
    UpBeforeGate: "test_swiglu_equals_float64",
    FusedGateUpBeforeGate: "test_fused_",
    FusedNormWithoutWeight: "test_fused_",
    NormWithoutEpsilon: "test_rms_norm_equals_float64",
    CacheOneLate: "test_update_cache_",
    ExpertsByRank: "test_expert_linear_",
    KeepsTheHostsMemory: "test_asarray_host_array_changes_later_copy_does_not",
    SharedState: "test_two_models_at_a_time_do_not_disturb_each_other",
}


LONG = (SharedState, DroppedScales, ExpertsByRank)
"""Faults that take the tests seconds to find."""


@pytest.mark.complete
@pytest.mark.parametrize(
    "faulty",
    [pytest.param(f, marks=[pytest.mark.complete] if f in LONG else []) for f in FAULTS],
    ids=lambda cls: cls.__name__,
)
def test_a_planted_fault_is_named(faulty: type[Backend]):
    name = FAULTS[faulty]
    keyword = name.partition("[")[0]
    results = runner.run(faulty, keyword=keyword)
    failed = [r for r in results if r.outcome == "failed"]
    assert any(r.name.startswith(name) for r in failed)
    assert all(r.message for r in failed)


def test_a_failure_tells_shape_and_error():
    results = runner.run(RopeOtherWay, keyword="test_rope_equals")
    messages = [r.message for r in results if r.outcome == "failed"]
    assert len(messages) == 3
    for message in messages:
        assert "shape (2, 3, 5, 8): relative error" in message
        assert "largest difference" in message


def test_a_sound_backend_passes_and_progress_is_told():
    calls: list[tuple[Any, ...]] = []
    results = runner.run(
        NumpyBackend, keyword="rope or swiglu", progress=lambda *call: calls.append(call)
    )
    assert {r.outcome for r in results} == {"passed"}
    assert calls[0] == ("testing", 0, len(results))
    assert calls[-1] == ("testing", len(results), len(results))
    parts = {row["part"]: row for row in runner.parts_of(results)}
    assert parts["operations"]["passed"] >= 5
    assert sum(row["passed"] for row in parts.values()) == len(results)


def test_an_expression_that_fits_nothing_is_an_error():
    with pytest.raises(PhicoreError, match=r"^conformance: no test fits 'nosuch'$"):
        runner.run(NumpyBackend, keyword="nosuch")


def test_a_backend_that_cannot_be_made_fails_each_test():
    def make(options: BackendOptions) -> Backend:
        raise RuntimeError("no device")

    results = runner.run(make, keyword="rope_equals")
    assert {r.outcome for r in results} == {"failed"}
    assert all("no device" in r.message for r in results)
