"""Rotary position tables, computed as the reference computes them.

Source: Su et al., "RoFormer" (2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import numpy as np

from phicore.network.config import Phi3Config

Tables = tuple[Any, Any]
"""Cosines and sines by position: two arrays (P, R) float32 on the device."""


@dataclass(frozen=True)
class RopeFactors:
    """Divisors of the rotary frequencies: two arrays (R,) float32, R = rotary_dim / 2.

    LongRoPE (Ding et al., 2024) has short factors for sequences within the original context, and
    long factors for longer sequences. Llama 3.1 has one set of factors, which is stored as both.
    """

    short: np.ndarray
    long: np.ndarray
    scale: float = 1.0
    """The factor for sines and cosines, at any length."""


def is_long(config: Phi3Config, length: int) -> bool:
    """Return whether a sequence with this planned length is rotated by the long factors."""
    original = config.original_max_position_embeddings
    return original is not None and length > original


def longrope_scale(context: int, original: int) -> float:
    """Return the factor by which LongRoPE multiplies sines and cosines in an extended context.

    Source: `_compute_longrope_parameters` of transformers.
    """
    ratio = context / original
    return sqrt(1 + log(ratio) / log(original)) if ratio > 1 else 1.0


def rope_tables(
    config: Phi3Config,
    positions: np.ndarray,
    factors: np.ndarray | None = None,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute scale times the cosine and sine of position * theta ** (-2 r / rotary_dim) / factor.

    The frequency and the angle are rounded to float32, as in transformers. At position 4000 this
    rounding is as large as 1e-4 of a turn. The cosine and sine of the rounded angle are computed in
    float64. The tables are computed once, on the host, so that every backend rotates by the same
    numbers.

    Args:
        positions: The positions, (S,) integers.
        factors: The divisors of the frequencies, (R,) float32. None means that all are 1.
    Returns:
        Cosines and sines, two (S, R) float32 arrays, R = rotary_dim / 2.
    """
    exponent = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    wavelength = np.float32(config.rope_theta) ** exponent  # (R,), over 2 pi
    if factors is not None:
        wavelength = factors * wavelength
    inv_freq = np.float32(1) / wavelength
    angle = positions.astype(np.float32)[:, None] * inv_freq  # (S, R)
    angle = angle.astype(np.float64)
    cos, sin = np.cos(angle), np.sin(angle)
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    return cos.astype(np.float32), sin.astype(np.float32)


def rope_at(xp: Any, tables: Tables, rows: Any) -> tuple[Any, Any]:
    """Look up rows (B, T) int32 in two tables (P, R); return cosines and sines, (B, T, R)."""

    def picked(table: Any) -> Any:
        found = xp.take(table, xp.reshape(rows, (-1,)), axis=0)
        return xp.reshape(found, (*rows.shape, table.shape[1]))

    return picked(tables[0]), picked(tables[1])
