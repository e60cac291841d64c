"""The packed form of a matrix, which the kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from gguf import GGMLQuantizationType

Array = Any
ROWS_OF_STRIP = 16


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["strips"],
    meta_fields=["type", "rows", "columns"],
)
@dataclass(frozen=True)
class Packed:
    """A matrix as the kernels read it: strips of 16 rows.

    Attributes:
        strips: (ceil(rows / 16), bytes of a strip) uint8. If there are X matrices, such as experts,
            there are X times as many strips, matrix after matrix.
        rows: Rows of one matrix.
    """

    strips: Array
    type: GGMLQuantizationType
    rows: int
    columns: int
