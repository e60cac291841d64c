"""The rotary tables on the device, which sequences look their positions up in."""

from __future__ import annotations

import numpy as np

from phicore.backend import Backend
from phicore.engine.chunks import capacity_for
from phicore.network.config import Phi3Config
from phicore.network.rope import RopeFactors, Tables, is_long, rope_tables

FIRST = 4096
"""The first table has rows for this many positions, or for the whole context if that is less."""


class RopeTables:
    """The rotary tables of a model, shared by all of its sequences.

    LongRoPE has one set of factors for sequences within the original context, and another for
    longer sequences. One table holds both parts, first short, then long, so that sequences of both
    kinds can share a step. A sequence looks up the row `start(is_long)` plus its position.
    """

    def __init__(self, ops: Backend, config: Phi3Config, factors: RopeFactors | None) -> None:
        self._ops = ops
        self._config = config
        self._factors = factors
        self._short_rows = 0
        if factors is not None and factors.short is not factors.long:
            assert config.original_max_position_embeddings is not None
            # A chunk that begins after a known prefix may be padded beyond the original context.
            padding = ops.capabilities.prompt_chunks[-1]
            self._short_rows = capacity_for(config.original_max_position_embeddings) + padding
        self._tables: Tables | None = None
        self._rows = 0

    def is_long(self, length: int) -> bool:
        """Return whether a sequence with this planned length is rotated by the long factors."""
        return self._factors is not None and is_long(self._config, length)

    def left(self, computed: int, is_long: bool) -> int | None:
        """Return how many more tokens the factors of a sequence hold for; None means no bound.

        Args:
            computed: Number of tokens that were run.
            is_long: Whether the sequence is rotated by the long factors.
        """
        if is_long or not self.has_two_parts:
            return None
        assert self._config.original_max_position_embeddings is not None
        return self._config.original_max_position_embeddings - computed

    @property
    def has_two_parts(self) -> bool:
        """Return whether there are short and long factors."""
        return self._short_rows > 0

    def start(self, is_long: bool) -> int:
        """Return the row of the tables for position 0."""
        return self._short_rows if is_long else 0

    def until(self, end: int, is_long: bool) -> Tables:
        """Return tables with rows for at least the positions below `end`.

        Tables have few different sizes, since steps are compiled for each.
        """
        if self._short_rows and not is_long:
            assert end <= self._short_rows
            needed = self._short_rows
        else:
            first = min(capacity_for(self._config.max_position_embeddings), FIRST)
            needed = self._short_rows + max(first, capacity_for(end))
        if self._tables is None or needed > self._rows:
            self._tables, self._rows = self._made(needed), needed
        return self._tables

    def _made(self, rows: int) -> Tables:
        parts = []
        if self._factors is None:
            parts.append(rope_tables(self._config, np.arange(rows)))
        else:
            short, long, scale = self._factors.short, self._factors.long, self._factors.scale
            for factors, count in ((short, self._short_rows), (long, rows - self._short_rows)):
                parts.append(rope_tables(self._config, np.arange(count), factors, scale))
        cos, sin = (np.concatenate(tables) for tables in zip(*parts, strict=True))
        return self._ops.asarray(cos), self._ops.asarray(sin)
