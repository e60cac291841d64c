"""The few shapes that steps are compiled for: chunks of a prompt, capacities of a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from phicore.backend.shapes import power_of_two

LOGITS_CHUNKS = (1, 64)
"""Chunk sizes where the logits of all tokens are wanted, which take V numbers each."""
MIN_CAPACITY = 256
"""Capacities are multiples of this."""


def capacity_for(positions: int) -> int:
    """Slots for this many tokens: 256 times a power of two, so that few capacities are compiled.

    Chunks of a prompt start at multiples of their size, so the padding of the last one fits too.
    """
    return MIN_CAPACITY * power_of_two(-(-positions // MIN_CAPACITY))


def capacity_of_window(window: int, chunk: int) -> int:
    """Slots for what a token sees before it and for a chunk of a prompt, in multiples of 256."""
    return -(-(window - 1 + chunk) // MIN_CAPACITY) * MIN_CAPACITY


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, perhaps with padding behind them.

    Attributes:
        tokens: (1, T) int32.
        positions: (1, T) int32.
        last: (1,) int32, the index of the last token that is no padding.
    """

    tokens: np.ndarray
    positions: np.ndarray
    last: np.ndarray

    @property
    def start(self) -> int:
        """The position of the first token."""
        return int(self.positions[0, 0])

    @property
    def size(self) -> int:
        """How many tokens it has, padding included."""
        return self.tokens.shape[1]

    @property
    def end(self) -> int:
        """The position after the last token that is no padding."""
        return self.start + int(self.last[0]) + 1


def chunk_at(
    tokens: Sequence[int], start: int, sizes: tuple[int, ...], *, is_padded: bool
) -> Chunk:
    """The chunk of a prompt that begins at a position.

    Args:
        sizes: Ascending from 1; each divides the next.
        is_padded: Whether a chunk must have one of the sizes. It is then padded to a size that is
            at most one and a half times as large, or to the smallest above 1. Otherwise a chunk is
            as large as the largest size allows.
    """
    left = len(tokens) - start
    size = min(left, sizes[-1])
    if is_padded and left not in sizes:
        above = next((s for s in sizes if s > left), sizes[-1])
        is_near = 2 * above <= 3 * left or above == sizes[1]
        size = above if is_near else max(s for s in sizes if s <= left)
    count = min(size, left)
    ids = np.zeros((1, size), np.int32)
    ids[0, :count] = tokens[start : start + count]
    positions = np.arange(start, start + size, dtype=np.int32)[None]
    return Chunk(ids, positions, np.array([count - 1], np.int32))


def chunks(tokens: Sequence[int], sizes: tuple[int, ...], *, is_padded: bool) -> Iterator[Chunk]:
    """Cut a whole prompt into chunks; see `chunk_at`."""
    start = 0
    while start < len(tokens):
        chunk = chunk_at(tokens, start, sizes, is_padded=is_padded)
        yield chunk
        start = chunk.end
