"""The caches of keys and values of several sequences, one in each row."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from phicore.backend import Backend, LayerCache
from phicore.backend.shapes import BLOCK_OF_SLOTS
from phicore.engine.steps import Place


def bytes_of(layer: LayerCache) -> int:
    """Return the number of bytes of a layer's cache."""
    return sum(getattr(a, "nbytes", 4 * prod(a.shape)) for a in layer.values())


@dataclass(eq=False)
class Cache:
    """The caches of all layers for B rows, and the positions that they hold.

    A cache has slots for all tokens or, if the model has a window, for the window and one chunk.
    When a cache of a model with a window is full, the slots of tokens that no later token sees are
    freed, and slot 0 then holds a later position. Keys need no change for that, since they were
    rotated when they were stored.

    Attributes:
        layers: The cache of each layer.
        capacity: S, the number of slots of a row.
        rope_start: The row of the rotary tables for position 0, (B,) int32 on the host.
        first: The position in slot 0 of each row, (B,) int32 on the host.
        place: `first` and `rope_start` on the device.
    """

    ops: Backend
    layers: list[LayerCache]
    capacity: int
    rope_start: np.ndarray
    first: np.ndarray

    def __post_init__(self) -> None:
        self._set_place()

    def _set_place(self) -> None:
        asarray = self.ops.asarray
        self.place: Place = {"first": asarray(self.first), "rope_start": asarray(self.rope_start)}

    @property
    def bytes(self) -> int:
        """Return the number of bytes of all layers, which have the same size."""
        return len(self.layers) * bytes_of(self.layers[0])

    def lacks(self, starts: np.ndarray, count: int) -> bool:
        """Return whether a row lacks slots for `count` tokens from its position in `starts` on."""
        return bool((starts + count - self.first > self.capacity).any())

    def unseen(self, starts: np.ndarray, count: int, window: int) -> np.ndarray:
        """Return how many slots each row can free, (B,) int32; 0 for a row that has room.

        The numbers are multiples of `BLOCK_OF_SLOTS`.

        Args:
            starts: The position of the next token in each row, (B,).
            count: The number of tokens to make room for.
            window: The number of positions that a token sees.
        """
        is_full = starts + count - self.first > self.capacity
        unseen = starts - (window - 1) - self.first
        unseen -= unseen % BLOCK_OF_SLOTS
        return np.where(is_full, unseen, 0).astype(np.int32)

    def freed(self, layers: list[LayerCache], counts: np.ndarray) -> None:
        """Replace the layers by layers in which the first `counts` (B,) slots were freed."""
        self.layers = layers
        self.first = self.first + counts
        self._set_place()

    def with_row(self, layers: list[LayerCache], index: int, row: Cache) -> Cache:
        """Return a cache with these layers, in which one row is the only row of another cache."""
        first, rope_start = self.first.copy(), self.rope_start.copy()
        first[index], rope_start[index] = row.first[0], row.rope_start[0]
        return Cache(self.ops, layers, self.capacity, rope_start, first)
