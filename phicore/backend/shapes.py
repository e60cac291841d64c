"""Sizes that steps are compiled for. They are few, since each new shape is compiled."""

from __future__ import annotations

PROMPT_CHUNKS = (1, 16, 32, 64, 128, 256)
"""Chunk sizes for prompts, ascending from 1; each divides the next."""
BLOCK_OF_SLOTS = 32
"""Slots at the front of a cache are freed in multiples of this. Attention that adds up a cache in
blocks of as many slots then finds a position in the same block and place as before."""


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
