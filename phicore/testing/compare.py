"""The comparison of numbers that all tests use."""

from __future__ import annotations

import numpy as np


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return norm(actual - expected) / norm(expected) in float64, or NaN if `actual` has a NaN."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape: expected {expected.shape}, got {actual.shape}")
    difference = float(np.linalg.norm(actual - expected))
    if difference == 0:
        return 0.0
    size = float(np.linalg.norm(expected))
    return difference / size if size else float("inf")


def assert_close(actual: np.ndarray, expected: np.ndarray, bound: float) -> None:
    """Assert that shapes agree, all numbers are finite and the relative error is within the bound.

    Raises:
        AssertionError: If one of these does not hold. The message has the relative error, the
            bound, and the index and values of the largest difference.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if not np.isfinite(expected).all():
        raise AssertionError("the expected values are not all finite")
    error = relative_error(actual, expected)
    if error <= bound:  # false for NaN too
        return
    difference = np.abs(actual.astype(np.float64) - expected)
    where = np.unravel_index(
        np.argmax(np.where(np.isnan(difference), np.inf, difference)), actual.shape
    )
    place = tuple(int(i) for i in where)
    raise AssertionError(
        f"shape {actual.shape}: relative error {error:.3g}, bound {bound:.3g}; largest difference "
        f"{difference[where]:.3g} at {place}: {actual[where]!r}, expected {expected[where]!r}"
    )
