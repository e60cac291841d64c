"""Tests of an engine's rotary tables: rows by absolute position, short factors before long ones."""

from dataclasses import replace

import numpy as np
import pytest
from unit.test_rope import CONFIG

from phicore.engine.rope_tables import FIRST, RopeTables
from phicore.network.config import Phi3Config
from phicore.network.rope import RopeFactors, rope_tables
from phicore.testing.conformance.models import Reference

R = CONFIG.rotary_dim // 2
FACTORS = RopeFactors(np.full(R, 1.5, np.float32), np.full(R, 8, np.float32), 1.1)


def long_config(original: int = 300, context: int = 20000) -> Phi3Config:
    return replace(
        CONFIG, original_max_position_embeddings=original, max_position_embeddings=context
    )


def test_tables_without_factors_are_those_of_all_positions():
    tables = RopeTables(Reference(), CONFIG, None).until(5, is_long=False)
    expected = rope_tables(CONFIG, np.arange(FIRST))
    for found, table in zip(tables, expected, strict=True):
        assert np.array_equal(found, table)


def test_short_and_long_rows_are_in_one_table():
    config = long_config()
    tables = RopeTables(Reference(), config, FACTORS)
    found = tables.until(301, is_long=True)
    positions = np.arange(300)
    for is_long, factors in ((False, FACTORS.short), (True, FACTORS.long)):
        rows = tables.start(is_long) + positions
        expected = rope_tables(config, positions, factors, FACTORS.scale)
        for table, each in zip(found, expected, strict=True):
            assert np.array_equal(table[rows], each)


def test_short_sequences_need_no_long_rows():
    tables = RopeTables(Reference(), long_config(), FACTORS)
    assert tables.start(False) == 0
    short = tables.until(300, is_long=False)[0]
    assert len(short) == tables.start(True) >= 300
    assert len(tables.until(301, is_long=True)[0]) > len(short)


def test_one_set_of_factors_for_all_lengths_is_one_table():
    """Llama 3.1 has one set of factors for all lengths."""
    same = RopeFactors(FACTORS.short, FACTORS.short)
    tables = RopeTables(Reference(), long_config(), same)
    assert tables.start(True) == tables.start(False) == 0
    expected = rope_tables(long_config(), np.arange(400), FACTORS.short)
    for is_long in (False, True):
        for table, each in zip(tables.until(400, is_long), expected, strict=True):
            assert np.array_equal(table[:400], each)


@pytest.mark.parametrize("is_long", [False, True])
def test_tables_grow_by_doubling_and_are_kept(is_long: bool):
    config = long_config()
    tables = RopeTables(Reference(), config, FACTORS if is_long else None)
    sizes = set()
    for end in range(1, 20000, 37):
        found = tables.until(end, is_long)
        assert len(found[0]) - tables.start(is_long) >= end
        assert tables.until(max(1, end - 5), is_long)[0] is found[0]
        sizes.add(len(found[0]))
    assert len(sizes) == 4  # 4096 positions, doubled three times
