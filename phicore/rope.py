"""Rotary position tables (Su et al., "RoFormer", 2021), as the reference computes them."""

from __future__ import annotations

import numpy as np

from phicore.config import Phi3Config


def rope_tables(config: Phi3Config, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of position * theta ** (-2 r / rotary_dim).

    The frequency and the angle are rounded to float32, as in transformers, whose rounding at
    position 4000 is as large as 1e-4 of a turn; cosine and sine are taken in float64 of that angle.
    They are made once on the host, so that every backend rotates by the same numbers.

    Returns:
        Two (length, R) float32 arrays, R = rotary_dim / 2.
    """
    exponent = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    inv_freq = np.float32(1) / np.float32(config.rope_theta) ** exponent  # (R,)
    angle = np.arange(length, dtype=np.float32)[:, None] * inv_freq  # (length, R)
    angle = angle.astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
