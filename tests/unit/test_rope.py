"""The rotary tables against the formula in float64."""

from dataclasses import replace

import numpy as np
import pytest
import tolerances

from phicore.config import Phi3Config
from phicore.rope import rope_tables

CONFIG = Phi3Config(
    architecture="phi3",
    hidden_size=192,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=96,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    rotary_dim=96,
    sliding_window=None,
)


@pytest.mark.parametrize(("rotary_dim", "theta"), [(96, 10000.0), (72, 250000.0), (2, 10000.0)])
def test_rope_tables_equal_float64_formula(rotary_dim: int, theta: float):
    config = replace(CONFIG, rotary_dim=rotary_dim, rope_theta=theta)
    cos, sin = rope_tables(config, 4096)
    position = np.arange(4096)[:, None]
    pair = np.arange(rotary_dim // 2)
    exponent = 2 * pair / rotary_dim
    angle = position * theta**-exponent
    angle_error = angle * (np.log(theta) * exponent + tolerances.ROPE_UNITS) * 2.0**-24
    for table, expected in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert table.shape == (4096, rotary_dim // 2)
        assert table.dtype == np.float32
        # The angle's error moves a cosine by as much; the last rounding adds half a unit.
        assert (np.abs(table - expected) <= angle_error + 2.0**-24).all()


def test_rope_tables_first_row_is_no_rotation():
    cos, sin = rope_tables(CONFIG, 1)
    assert (cos == 1).all()
    assert (sin == 0).all()
    assert cos.shape == sin.shape == (1, 48)


def test_rope_tables_longer_table_starts_with_the_shorter():
    for short, long in zip(rope_tables(CONFIG, 7), rope_tables(CONFIG, 50), strict=True):
        assert np.array_equal(short, long[:7])


def test_rope_tables_two_thetas_differ():
    """A table that is kept for the next model must not come back for another base."""
    first, _ = rope_tables(CONFIG, 10)
    second, _ = rope_tables(replace(CONFIG, rope_theta=500.0), 10)
    assert not np.array_equal(first, second)
