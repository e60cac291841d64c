"""A matrix and a cache as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from gguf import GGMLQuantizationType

Array = Any
ROWS_OF_STRIP = 16
CACHE_ROWS = {
    "i24": ("i24", "i16"),
    "i16": ("i16", "i16"),
    "f16": ("f16", "f16"),
    "f32": ("f32", "f32"),
    "q8_0": ("q8_0", "q8_0"),
}
"""How each type of cache stores keys, and how values, whose rounding matters less."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["strips"],
    meta_fields=["type", "rows", "columns"],
)
@dataclass(frozen=True)
class Packed:
    """A matrix as the kernels read it: strips of 16 rows.

    Attributes:
        strips: (ceil(rows / 16), bytes of a strip) uint8; those of X matrices one after the other.
    """

    strips: Array
    type: GGMLQuantizationType
    rows: int
    columns: int
