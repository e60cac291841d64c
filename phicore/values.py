"""Values of a file's metadata that say the same thing in another type, since converters differ."""

from __future__ import annotations

from typing import Any

import numpy as np

_SCALARS = (bool, int, float, str)


def as_kind(value: Any, kind: type) -> Any:
    """Return a value as `kind` if nothing is lost by it.

    Some converters write a flag as 0 or 1, a whole number as a float, or one value as an array. A
    value that says something else is returned as it is.
    """
    if isinstance(value, (list, np.ndarray)) and len(value) == 1 and kind in _SCALARS:
        value = value[0]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, kind):
        return value
    if kind is bool and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
