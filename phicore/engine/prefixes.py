"""The prefix cache: what ended sequences have computed, for sequences that begin the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from phicore.engine.cache import Cache

SHORTEST = 16
"""Fewer common tokens than this are read again, since that is as fast as to copy them."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """The cache of an ended sequence.

    Attributes:
        tokens: The tokens whose keys and values it holds, (N,) int32. A model with a window has
            freed the slots of the first ones, and `cache.first` says how many.
        is_long: Whether LongRoPE's long factors rotated the keys.
        cache: The cache, of one row.
    """

    tokens: np.ndarray
    is_long: bool
    cache: Cache

    @cached_property
    def bytes(self) -> int:
        """Return the number of bytes of the cache."""
        return self.cache.bytes

    def common(self, tokens: np.ndarray, is_long: bool, window: int | None) -> int:
        """Return how many tokens of a sequence this has computed, 0 if it cannot be used.

        Args:
            tokens: The tokens of the sequence, (N,) int32.
            is_long: Whether the sequence is rotated by the long factors.
            window: The number of positions that a token sees; None means all.
        """
        if is_long != self.is_long:
            return 0
        return common(self.tokens, tokens, int(self.cache.first[0]), window)


def common(known: np.ndarray, tokens: np.ndarray, first: int, window: int | None) -> int:
    """Return how many tokens at the beginning of a sequence another one has computed for it.

    Args:
        known: The tokens that the other one has computed, (N,) int32.
        tokens: The tokens of the sequence, (M,) int32. Its last one must be run, for its scores.
        first: The first position whose keys and values the other one still has.
        window: The number of positions that a token sees; None means all.
    Returns:
        The number; 0 if the keys and values are of no use, or not worth a copy.
    """
    most = min(len(known), len(tokens) - 1)
    differs = known[:most] != tokens[:most]
    count = int(differs.argmax()) if differs.any() else most
    # The next token sees `window - 1` positions before it.
    is_seen = first == 0 or (window is not None and count - (window - 1) >= first)
    return count if is_seen and count >= SHORTEST else 0


class Prefixes:
    """The caches of ended sequences, up to a number of bytes; the least recently used go first.

    Attributes:
        most_bytes: The largest number of bytes; 0 keeps nothing.
        window: The number of positions that a token of the model sees; None means all.
    """

    def __init__(self, most_bytes: int, window: int | None = None) -> None:
        self.most_bytes = most_bytes
        self.window = window
        self._entries: list[Prefix] = []  # the least recently used one first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def bytes(self) -> int:
        """Return the number of bytes of all caches."""
        return sum(entry.bytes for entry in self._entries)

    def add(self, prefix: Prefix) -> None:
        """Add a cache. Caches of a part of the same tokens are removed, and the oldest ones."""
        if prefix.cache.bytes > self.most_bytes or len(prefix.tokens) < SHORTEST:
            return
        self._entries = [e for e in self._entries if not _replaces(prefix, e)]
        self._entries.append(prefix)
        self.shrink(self.most_bytes)

    def find(self, tokens: Sequence[int], *, is_long: bool) -> tuple[Prefix, int] | None:
        """Return the entry that has most of a sequence's first tokens, and how many.

        An entry whose tokens are all used is removed: it belongs to a conversation that goes on.
        Its cache may be changed. Otherwise the cache must be copied.
        """
        ids = np.array(tokens, np.int32)
        counts = [entry.common(ids, is_long, self.window) for entry in self._entries]
        most = max(counts, default=0)
        if not most:
            return None
        entry = self._entries.pop(counts.index(most))
        if most < len(entry.tokens):
            self._entries.append(entry)  # now the most recently used one
        return entry, most

    def __contains__(self, prefix: Prefix) -> bool:
        return any(entry is prefix for entry in self._entries)

    def touch(self, tokens: Sequence[int], *, is_long: bool) -> tuple[Prefix | None, bool]:
        """Return the entry that `find` would use, and whether it would be removed.

        It becomes the most recently used one.
        """
        found = self.find(tokens, is_long=is_long)
        if found is None:
            return None, False
        is_removed = found[0] not in self
        if is_removed:
            self._entries.append(found[0])
        return found[0], is_removed

    def longest(self, tokens: Sequence[int]) -> Prefix | None:
        """Return the entry all of whose tokens a sequence begins with, the longest one."""
        ids = np.array(tokens, np.int32)
        found = [e for e in self._entries if np.array_equal(ids[: len(e.tokens)], e.tokens)]
        return max(found, key=lambda entry: len(entry.tokens), default=None)

    def shrink(self, most_bytes: int) -> None:
        """Remove the least recently used caches until the rest has at most this size."""
        while self._entries and self.bytes > most_bytes:
            del self._entries[0]

    def clear(self) -> None:
        """Remove all caches."""
        self._entries.clear()


def _replaces(new: Prefix, old: Prefix) -> bool:
    """Return whether everything that an old entry is good for can be had from a new one."""
    count = len(old.tokens)
    return (
        new.is_long == old.is_long
        and count <= len(new.tokens)
        and bool(new.cache.first[0] <= old.cache.first[0])
        and np.array_equal(new.tokens[:count], old.tokens)
    )
