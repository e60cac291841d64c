"""Tests of the rotary tables, compared with the formula in float64."""

from dataclasses import replace

import numpy as np
import pytest

from phicore.network.architectures.phi3 import Phi3
from phicore.network.architectures.phimoe import PhiMoE
from phicore.network.config import Phi3Config
from phicore.network.rope import is_long, longrope_scale, rope_tables
from phicore.testing import tolerances

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
    cos, sin = rope_tables(config, np.arange(4096))
    position = np.arange(4096)[:, None]
    pair = np.arange(rotary_dim // 2)
    exponent = 2 * pair / rotary_dim
    angle = position * theta**-exponent
    angle_error = angle * (np.log(theta) * exponent + tolerances.ROPE_UNITS) * 2.0**-24
    for table, expected in ((cos, np.cos(angle)), (sin, np.sin(angle))):
        assert table.shape == (4096, rotary_dim // 2)
        assert table.dtype == np.float32
        # An error of the angle changes a cosine by no more than itself. The final rounding adds
        # half a unit.
        assert (np.abs(table - expected) <= angle_error + 2.0**-24).all()


def test_rope_tables_first_row_is_no_rotation():
    cos, sin = rope_tables(CONFIG, np.arange(1))
    assert (cos == 1).all()
    assert (sin == 0).all()
    assert cos.shape == sin.shape == (1, 48)


def test_rope_tables_longer_table_starts_with_the_shorter():
    for short, long in zip(
        rope_tables(CONFIG, np.arange(7)), rope_tables(CONFIG, np.arange(50)), strict=True
    ):
        assert np.array_equal(short, long[:7])


def test_rope_tables_two_thetas_differ():
    """A table cached for one model must not be used for a model with another base."""
    first, _ = rope_tables(CONFIG, np.arange(10))
    second, _ = rope_tables(replace(CONFIG, rope_theta=500.0), np.arange(10))
    assert not np.array_equal(first, second)


def test_rope_tables_factors_divide_frequencies_and_scale_multiplies():
    factors = np.linspace(1, 9, 48, dtype=np.float32)
    cos, sin = rope_tables(CONFIG, np.arange(300), factors, 1.25)
    angle = np.arange(300)[:, None] / (factors * 10000.0 ** (np.arange(48) / 48))
    np.testing.assert_allclose(cos, 1.25 * np.cos(angle), atol=1e-4)
    np.testing.assert_allclose(sin, 1.25 * np.sin(angle), atol=1e-4)
    plain, _ = rope_tables(CONFIG, np.arange(300))
    ones, _ = rope_tables(CONFIG, np.arange(300), np.ones(48, np.float32))
    assert np.array_equal(plain, ones)


@pytest.mark.parametrize(
    ("original", "length", "expected"),
    [(None, 10**6, False), (4096, 4096, False), (4096, 4097, True)],
)
def test_is_long_beyond_the_original_context(original: int | None, length: int, expected: bool):
    assert is_long(replace(CONFIG, original_max_position_embeddings=original), length) == expected


def test_longrope_scale_is_that_of_the_paper():
    assert longrope_scale(131072, 4096) == pytest.approx(1.190238)  # Phi-3-mini-128k
    assert longrope_scale(8192, 4096) == np.sqrt(1 + 1 / 12)
    assert longrope_scale(4096, 4096) == 1


def test_rope_scale_of_a_file_wins():
    scale = Phi3().rope_scale
    config = replace(CONFIG, max_position_embeddings=131072)
    assert scale(config, 4096) == pytest.approx(1.190238)
    assert scale(replace(config, attention_factor=1.5), 4096) == 1.5


def test_rope_scale_of_phi_3_5_moe_is_that_of_its_training():
    """Its files hold the scale of the formula, but the model's configuration has another scale."""
    scale = PhiMoE().rope_scale
    model = replace(CONFIG, max_position_embeddings=131072)
    assert scale(model, 4096) == 1.243163121016122
    by_formula = float(np.float32(np.sqrt(1 + np.log(32) / np.log(4096))))
    assert scale(replace(model, attention_factor=by_formula), 4096) == 1.243163121016122
    assert scale(replace(model, attention_factor=1.2), 4096) == 1.2
    assert scale(replace(model, max_position_embeddings=8192), 4096) == np.sqrt(1 + 1 / 12)
