"""The byte layout of quantized blocks: the fields of each type, described once for all readers.

A block holds `columns` consecutive values of a row. Values are in groups that share a scale:

    value = scale * (code - offset) + bias

A block of 32 columns has one group, with scale `d` and bias `dmin`. A block of 256 columns has
groups of 16 or 32, and `scales` has integers for each group. The scale of a group is `d` times its
first integer. If the type has `dmin`, the bias is minus `dmin` times its second integer.

Source: ggml-common.h, `block_q4_0` to `block_q6_K`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

Type = GGMLQuantizationType


@dataclass(frozen=True)
class Field:
    """A range of bytes in a block. A field that a type lacks has size 0 and is false."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size

    def __bool__(self) -> bool:
        return self.size > 0

    def of(self, blocks: Any) -> Any:
        """Slice the field, (..., size), from blocks (..., bytes), arrays of any library."""
        return blocks[..., self.start : self.end]


@dataclass(frozen=True)
class Bits(Field):
    """A field with some bits of every code.

    Attributes:
        run: The length of a run of bytes. The lowest bits of a run's bytes belong to the first
            `run` codes, the next higher bits to the next `run` codes, and so on.
    """

    run: int


ABSENT = Bits(0, 0, 1)


@dataclass(frozen=True)
class Block:
    """The fields in the blocks of a type.

    Attributes:
        group_size: The number of values that share a scale.
        offset: The number that is subtracted from a code. It is 0 for Q8_0, whose codes are signed.
        d: The scale of the block, float16.
        low: The lowest bits of the codes.
        high: The bits of the codes above `low`.
        dmin: The minimum of the block, float16.
        scales: The integers that `d` and `dmin` are multiplied by. Each type packs them
            differently.
    """

    type: GGMLQuantizationType
    group_size: int
    offset: int
    d: Field
    low: Bits
    high: Bits = ABSENT
    dmin: Field = ABSENT
    scales: Field = ABSENT

    @property
    def columns(self) -> int:
        return int(GGML_QUANT_SIZES[self.type][0])

    @property
    def size(self) -> int:
        """Return the size of a block in bytes."""
        return int(GGML_QUANT_SIZES[self.type][1])

    @property
    def low_bits(self) -> int:
        """Return the number of bits of a code in `low`."""
        return 8 * self.low.size // self.columns

    @property
    def high_bits(self) -> int:
        """Return the number of bits of a code in `high`."""
        return 8 * self.high.size // self.columns

    @property
    def bits(self) -> int:
        """Return the number of bits of a code."""
        return self.low_bits + self.high_bits


Q4_0 = Block(
    Type.Q4_0,
    group_size=32,
    offset=8,
    d=Field(0, 2),
    low=Bits(2, 16, run=16),
)
Q4_1 = Block(
    Type.Q4_1,
    group_size=32,
    offset=0,
    d=Field(0, 2),
    dmin=Field(2, 2),
    low=Bits(4, 16, run=16),
)
Q5_0 = Block(
    Type.Q5_0,
    group_size=32,
    offset=16,
    d=Field(0, 2),
    high=Bits(2, 4, run=1),
    low=Bits(6, 16, run=16),
)
Q5_1 = Block(
    Type.Q5_1,
    group_size=32,
    offset=0,
    d=Field(0, 2),
    dmin=Field(2, 2),
    high=Bits(4, 4, run=1),
    low=Bits(8, 16, run=16),
)
Q8_0 = Block(
    Type.Q8_0,
    group_size=32,
    offset=0,
    d=Field(0, 2),
    low=Bits(2, 32, run=32),
)
Q2_K = Block(
    Type.Q2_K,
    group_size=16,
    offset=0,
    scales=Field(0, 16),
    low=Bits(16, 64, run=32),
    d=Field(80, 2),
    dmin=Field(82, 2),
)
Q3_K = Block(
    Type.Q3_K,
    group_size=16,
    offset=4,
    high=Bits(0, 32, run=32),
    low=Bits(32, 64, run=32),
    scales=Field(96, 12),
    d=Field(108, 2),
)
Q4_K = Block(
    Type.Q4_K,
    group_size=32,
    offset=0,
    d=Field(0, 2),
    dmin=Field(2, 2),
    scales=Field(4, 12),
    low=Bits(16, 128, run=32),
)
Q5_K = Block(
    Type.Q5_K,
    group_size=32,
    offset=0,
    d=Field(0, 2),
    dmin=Field(2, 2),
    scales=Field(4, 12),
    high=Bits(16, 32, run=32),
    low=Bits(48, 128, run=32),
)
Q6_K = Block(
    Type.Q6_K,
    group_size=16,
    offset=32,
    low=Bits(0, 128, run=64),
    high=Bits(128, 64, run=32),
    scales=Field(192, 16),
    d=Field(208, 2),
)

BLOCKS = {
    block.type: block for block in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
}
"""The blocks of every type that this module describes."""
