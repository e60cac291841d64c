"""Rotary position tables (Su et al., "RoFormer", 2021), as the reference computes them."""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose, log, sqrt

import numpy as np

from phicore.config import Phi3Config


@dataclass(frozen=True)
class RopeFactors:
    """What the rotary frequencies are divided by: two of (R,) float32, R = rotary_dim / 2.

    LongRoPE (Ding et al., 2024) has factors for sequences within the original context and for
    longer ones. Llama 3.1 has one set for all, which is given twice.
    """

    short: np.ndarray
    long: np.ndarray
    scale: float = 1.0
    """What sines and cosines are multiplied by, at any length."""


PHI_3_5_MOE_SCALE = 1.243163121016122  # `short_mscale` and `long_mscale` of its configuration


def is_long(config: Phi3Config, length: int) -> bool:
    """Whether a sequence that is planned to be so long rotates by the long factors."""
    original = config.original_max_position_embeddings
    return original is not None and length > original


def attention_factor(config: Phi3Config) -> float:
    """The scale of LongRoPE.

    Source: `_compute_longrope_parameters` of transformers. Phi-3.5-MoE was trained with a scale of
    its own, for which llama.cpp's converter writes what the formula gives.
    """
    original = config.original_max_position_embeddings or config.max_position_embeddings
    ratio = config.max_position_embeddings / original
    by_formula = sqrt(1 + log(ratio) / log(original)) if ratio > 1 else 1.0
    scale = by_formula if config.attention_factor is None else config.attention_factor
    is_phi_3_5_moe = config.architecture == "phimoe" and (original, ratio) == (4096, 32)
    if is_phi_3_5_moe and isclose(scale, by_formula, rel_tol=1e-6):
        return PHI_3_5_MOE_SCALE
    return scale


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
