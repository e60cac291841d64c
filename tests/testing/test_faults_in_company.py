"""Faults of backends that appear with several rows, moved slots, sessions or guesses; the kit names
each of them."""

from __future__ import annotations

import numpy as np
import pytest
from phicore_numpy.backend import NumpyBackend

from phicore.backend import DEFAULTS, Array, Backend, BackendOptions, LayerCache, Weight
from phicore.testing import runner


class LiveOfTheFirstRow(NumpyBackend):
    """A backend that reads as many slots of each row as the first row uses."""

    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        live = int(slots[0].max()) + 1
        prefix = {name: array[:, :, :live] for name, array in cache.items()}
        return super().attention(q, prefix, np.minimum(slots, live - 1), scale, window)


class RotatesAsTheFirstRow(NumpyBackend):
    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        return super().rope(x, cos[:1], sin[:1])


class CoarseInCompany(NumpyBackend):
    """A backend that has another kernel for several rows, which rounds products to 8 bits."""

    def linear(self, x: Array, weight: Weight) -> Array:
        y = super().linear(x, weight)
        if x.shape[0] < 2:
            return y
        return (y.view(np.int32) & ~0xFFFF).view(np.float32)


class EmbedsTheFirstRow(NumpyBackend):
    def embedding(self, ids: Array, weight: Weight) -> Array:
        return super().embedding(np.broadcast_to(ids[:1], ids.shape), weight)


class InsertsIntoTheFirstRow(NumpyBackend):
    def insert_row(
        self, cache: LayerCache, row: LayerCache, index: Array, slots: Array
    ) -> LayerCache:
        return super().insert_row(cache, row, np.zeros_like(index), slots)


class CopiesRowsInTheirOldOrder(NumpyBackend):
    def copy_rows(self, cache: LayerCache, rows: Array, slots: Array, capacity: int) -> LayerCache:
        return super().copy_rows(cache, np.sort(rows), slots, capacity)


class KeepsTheCopiedMemory(NumpyBackend):
    """A backend whose copy of a row is a view, so that both change together."""

    def copy_rows(self, cache: LayerCache, rows: Array, slots: Array, capacity: int) -> LayerCache:
        if len(rows) == 1 and cache["k"].shape[2] == capacity:
            return {name: array[rows[0] : rows[0] + 1] for name, array in cache.items()}
        return super().copy_rows(cache, rows, slots, capacity)


class ShiftsAllRowsAlike(NumpyBackend):
    def shift_cache(self, cache: LayerCache, count: Array) -> LayerCache:
        return super().shift_cache(cache, np.full_like(count, count.max()))


class WritesSlotsOnce(NumpyBackend):
    """A backend that adds keys at the end of what it has: a refused guess stays in its slot."""

    def __init__(self, options: BackendOptions = DEFAULTS) -> None:
        super().__init__(options)
        self._written: dict[int, Array] = {}

    def new_cache(self, *shape: int) -> LayerCache:
        cache = super().new_cache(*shape)
        self._written[id(cache["k"])] = np.zeros((shape[0], shape[2]), bool)
        return cache

    def update_cache(self, cache: LayerCache, k: Array, v: Array, slots: Array) -> LayerCache:
        written = self._written.get(id(cache["k"]))
        if written is None:
            return super().update_cache(cache, k, v, slots)
        before = {name: array.copy() for name, array in cache.items()}
        found = super().update_cache(cache, k, v, slots)
        for b, row in enumerate(slots):
            for slot in row:
                if written[b, slot]:
                    for name, array in found.items():
                        array[b, :, slot] = before[name][b, :, slot]
                written[b, slot] = True
        return found


class ForgetsWhatItHasNotWritten(NumpyBackend):
    """A backend with a state: it lets tokens see only slots from the first that it has written."""

    first: int | None = None

    def update_cache(self, cache: LayerCache, k: Array, v: Array, slots: Array) -> LayerCache:
        lowest = int(slots.min())
        self.first = lowest if self.first is None else min(self.first, lowest)
        return super().update_cache(cache, k, v, slots)

    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        first = self.first or 0
        seen = {name: array[:, :, first:] for name, array in cache.items()}
        return super().attention(q, seen, slots - first, scale, window)


FAULTS: dict[type[Backend], tuple[str, ...]] = {
    LiveOfTheFirstRow: ("test_text_in_a_crowd_", "test_attention_equals_float64"),
    RotatesAsTheFirstRow: ("test_text_in_a_crowd_",),
    CoarseInCompany: ("test_text_in_a_crowd_",),
    EmbedsTheFirstRow: ("test_text_in_a_crowd_",),
    InsertsIntoTheFirstRow: ("test_text_in_a_crowd_", "test_insert_row_"),
    CopiesRowsInTheirOldOrder: ("test_copy_rows_copies_",),
    KeepsTheCopiedMemory: ("test_copy_rows_shares_no_memory_",),
    ShiftsAllRowsAlike: ("test_shift_cache_",),
    WritesSlotsOnce: ("test_text_with_guesses_",),
    ForgetsWhatItHasNotWritten: ("test_session_of_another_process_",),
}
"""For each fault, the tests of the kit that name it."""


@pytest.mark.complete
@pytest.mark.parametrize("faulty", FAULTS, ids=lambda cls: cls.__name__)
def test_a_fault_in_company_is_named(faulty: type[Backend]) -> None:
    names = FAULTS[faulty]
    results = runner.run(faulty, keyword=" or ".join(names))
    failed = {r.name for r in results if r.outcome == "failed"}
    for name in names:
        assert any(test.startswith(name) for test in failed), f"{name} passed"


@pytest.mark.complete
@pytest.mark.parametrize("faulty", [RotatesAsTheFirstRow, EmbedsTheFirstRow])
def test_a_fault_of_rows_is_named_by_the_laws(faulty: type[Backend]) -> None:
    results = runner.run(faulty, keyword="test_logits_two_sequences_in_a_batch_")
    assert {r.outcome for r in results} == {"failed"}


@pytest.mark.complete
def test_a_state_that_a_session_lacks_is_seen_by_no_other_test() -> None:
    """Check that the test of sessions is needed: operations, laws and models see nothing."""
    other = "(operations or attention or laws or models) and not two_models"
    results = runner.run(ForgetsWhatItHasNotWritten, keyword=other)
    assert len(results) > 50
    assert "failed" not in {r.outcome for r in results}
