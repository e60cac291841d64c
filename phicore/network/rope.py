"""Rotary position tables (Su et al., "RoFormer", 2021), as the reference computes them."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import numpy as np

from phicore.network.config import Phi3Config

Tables = tuple[Any, Any]
"""Cosines and sines by position: two arrays (P, R) float32 of a backend."""


@dataclass(frozen=True)
class RopeFactors:
    """Factors that the rotary frequencies are divided by: two of (R,) float32, R = rotary_dim / 2.

    LongRoPE (Ding et al., 2024) has factors for sequences within the original context and for
    longer ones. Llama 3.1 has one set for all, which is given twice.
    """

    short: np.ndarray
    long: np.ndarray
    scale: float = 1.0
    """Sines and cosines are multiplied by this, at any length."""


def is_long(config: Phi3Config, length: int) -> bool:
    """Whether a sequence that is planned to be so long is rotated by the long factors."""
    original = config.original_max_position_embeddings
    return original is not None and length > original


def longrope_scale(context: int, original: int) -> float:
    """The factor by which LongRoPE multiplies sines and cosines in an extended context.

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
    """Cosines and sines of position * theta ** (-2 r / rotary_dim) / factor, times scale.

    The frequency and the angle are rounded to float32, as in transformers, whose rounding at
    position 4000 is as large as 1e-4 of a turn; cosine and sine are taken in float64 of that angle.
    They are made once on the host, so that every backend rotates by the same numbers.

    Args:
        positions: (S,) integers.
        factors: (R,) float32; None: all 1.
    Returns:
        Two (S, R) float32 arrays, R = rotary_dim / 2.
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
    """Look up rows (B, T) int32 of two tables (P, R): cosines and sines, (B, T, R)."""

    def picked(table: Any) -> Any:
        found = xp.take(table, xp.reshape(rows, (-1,)), axis=0)
        return xp.reshape(found, (*rows.shape, table.shape[1]))

    return picked(tables[0]), picked(tables[1])
