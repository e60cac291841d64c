"""The few shapes that steps are compiled for: sizes of a prompt's chunks, capacities of a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from phicore.backend.shapes import power_of_two

LOGITS_CHUNKS = (1, 64)
MIN_CAPACITY = 256


def capacity_for(positions: int) -> int:
    """Room for this many positions: 256 times a power of two, for few recompilations.

    Since chunks of a prompt start at multiples of their size, it has room for the padding of the
    last one too.
    """
    return MIN_CAPACITY * power_of_two(-(-positions // MIN_CAPACITY))


def capacity_of_window(window: int, chunk: int) -> int:
    """Room for what a token sees before it and for a chunk of a prompt, in multiples of 256."""
    return -(-(window - 1 + chunk) // MIN_CAPACITY) * MIN_CAPACITY


def chunks(
    tokens: Sequence[int], sizes: tuple[int, ...], *, is_padded: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut a prompt into pieces: of the given sizes, some padded, or else as large as the largest.

    Each size divides the next. A piece is padded to a size that is at most one and a half times as
    large, or to the smallest above 1.

    Yields:
        Tokens (1, T) and positions (1, T) int32, and the index (1,) of the last real token.
    """
    start = 0
    while start < len(tokens):
        left = len(tokens) - start
        size = min(left, sizes[-1])
        if is_padded and left not in sizes:
            above = next((s for s in sizes if s > left), sizes[-1])
            is_near = 2 * above <= 3 * left or above == sizes[1]
            size = above if is_near else max(s for s in sizes if s <= left)
        count = min(size, left)
        chunk = np.zeros((1, size), np.int32)
        chunk[0, :count] = tokens[start : start + count]
        positions = np.arange(start, start + size, dtype=np.int32)[None]
        yield chunk, positions, np.array([count - 1], np.int32)
        start += count
