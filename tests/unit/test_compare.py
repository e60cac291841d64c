"""Tests that the shared comparison `assert_close` fails on wrong input."""

import numpy as np
import pytest

from phicore.testing.compare import assert_close, relative_error

EXPECTED = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)


def test_relative_error_known_difference_is_exact():
    assert relative_error([[3, 0], [0, 4.5]], EXPECTED) == 0.1
    assert relative_error(EXPECTED, EXPECTED) == 0
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.ones(2), np.zeros(2)) == np.inf


def test_assert_close_within_bound_passes():
    assert_close(EXPECTED * 1.0001, EXPECTED, 1.1e-4)


def test_assert_close_wrong_value_fails_with_the_place():
    wrong = EXPECTED.copy()
    wrong[1, 0] = 0.5
    with pytest.raises(AssertionError, match=r"relative error 0\.1, bound 0\.01.* at \(1, 0\)"):
        assert_close(wrong, EXPECTED, 1e-2)


def test_assert_close_swapped_axes_fails():
    with pytest.raises(AssertionError, match="bound"):
        assert_close(EXPECTED[::-1], EXPECTED, 1e-2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_assert_close_not_finite_fails(value: float):
    wrong = EXPECTED.copy()
    wrong[0, 1] = value
    with pytest.raises(AssertionError, match=r"at \(0, 1\)"):
        assert_close(wrong, EXPECTED, 1e9)
    with pytest.raises(AssertionError, match="expected values are not all finite"):
        assert_close(wrong, wrong, 1e9)


@pytest.mark.parametrize("shape", [(4,), (1, 2, 2), (2, 1)])
def test_assert_close_wrong_shape_fails(shape: tuple[int, ...]):
    with pytest.raises(AssertionError, match=r"shape: expected \(2, 2\), got"):
        assert_close(np.resize(EXPECTED, shape), EXPECTED, 1e9)


def test_assert_close_broadcastable_shape_fails():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(np.ones((1,)), np.ones((3,)), 1.0)


def test_assert_close_zero_expected_passes_only_zero():
    assert_close(np.zeros(3), np.zeros(3), 0)
    with pytest.raises(AssertionError, match="relative error inf"):
        assert_close(np.full(3, 1e-30), np.zeros(3), 1.0)
