"""Sizes that steps are compiled for: chunks of a prompt, and capacities of a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from phicore.backend.shapes import BLOCK_OF_SLOTS, power_of_two

LOGITS_CHUNKS = (1, 64)
"""Chunk sizes for computing the logits of all tokens. They are small: a token has V logits."""
MIN_CAPACITY = 256
"""Capacities are multiples of this, but for those that a window limits."""


def capacity_for(positions: int) -> int:
    """Return a capacity for this many positions: 256 times a power of two.

    So steps are compiled for few capacities. Chunks of a prompt start at multiples of their size,
    so the padding of the last chunk fits, too.
    """
    return MIN_CAPACITY * power_of_two(-(-positions // MIN_CAPACITY))


def capacity_of_window(window: int, chunk: int) -> int:
    """Return a capacity for a window and a chunk of a prompt, rounded up to whole blocks of slots.

    It has room for the unseen slots that are not freed because they do not fill a block.
    """
    slots = window - 1 + BLOCK_OF_SLOTS - 1 + chunk
    return -(-slots // BLOCK_OF_SLOTS) * BLOCK_OF_SLOTS


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, which may be followed by padding.

    Attributes:
        tokens: The token ids, (1, T) int32.
        positions: The positions of the tokens, (1, T) int32.
        last: The index of the last token before the padding, (1,) int32.
    """

    tokens: np.ndarray
    positions: np.ndarray
    last: np.ndarray

    @property
    def start(self) -> int:
        """Return the position of the first token."""
        return int(self.positions[0, 0])

    @property
    def size(self) -> int:
        """Return the number of tokens, padding included."""
        return self.tokens.shape[1]

    @property
    def end(self) -> int:
        """Return the position after the last token before the padding."""
        return self.start + int(self.last[0]) + 1


def chunk_at(
    tokens: Sequence[int], start: int, sizes: tuple[int, ...], *, is_padded: bool
) -> Chunk:
    """Return the chunk of a prompt that begins at position `start`.

    Args:
        sizes: The chunk sizes, ascending from 1; each divides the next.
        is_padded: Whether a chunk must have one of the sizes. The rest of a prompt is then padded
            to the next size if that is at most 1.5 times as large or is the smallest size above 1;
            otherwise the chunk has the next smaller size. If False, a chunk has any size up to the
            largest, without padding.
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
    """Cut a prompt into chunks; `chunk_at` describes the arguments."""
    start = 0
    while start < len(tokens):
        chunk = chunk_at(tokens, start, sizes, is_padded=is_padded)
        yield chunk
        start = chunk.end
