"""The backend that others are compared with."""

from __future__ import annotations

import numpy as np

from phicore.backend import Array, Backend


class Reference(Backend):
    """The protocol's default operations on NumPy, which define what every operation means."""

    xp = np

    def asarray(self, x: np.ndarray) -> Array:
        return np.array(x)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x)
