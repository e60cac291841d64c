"""Sizes that steps are compiled for. They are few, since each new shape is compiled."""

from __future__ import annotations

PROMPT_CHUNKS = (1, 16, 32, 64, 128, 256)
"""Chunk sizes for prompts, ascending from 1; each divides the next."""


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
