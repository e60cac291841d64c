"""Tests of the fields of quantized blocks: they fill the block, and each code has enough bits."""

from __future__ import annotations

import pytest

from phicore.gguf.blocks import ABSENT, BLOCKS, Block

each_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=lambda b: b.type.name)


@each_block
def test_fields_cover_a_block_without_gap_or_overlap(block: Block):
    fields = [f for f in (block.d, block.dmin, block.scales, block.low, block.high) if f]
    end = 0
    for field in sorted(fields, key=lambda f: f.start):
        assert field.start == end
        end = field.end
    assert end == block.size


@each_block
def test_codes_have_the_bits_of_the_types_name(block: Block):
    assert block.bits == int(block.type.name[1])
    for field, bits in ((block.low, block.low_bits), (block.high, block.high_bits)):
        assert field.size % field.run == 0
        assert bits * block.columns == 8 * field.size


def test_field_that_a_type_lacks_is_false():
    assert not ABSENT
    assert all(block.d and block.low for block in BLOCKS.values())
