"""Values of a file's metadata that say the same thing in another type, since converters differ."""

from __future__ import annotations

from typing import Any

_SCALARS = (bool, int, float, str)


def as_kind(value: Any, kind: type) -> Any:
    """Return a value as `kind` if nothing is lost by it.

    Some converters write a flag as 0 or 1, a whole number as a float, or one value as an array. A
    value that says something else is returned as it is, arrays of NumPy as lists.
    """
    if kind not in _SCALARS:
        return value
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers; NumPy itself is slow to import
        value = value.tolist()
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if kind is bool and isinstance(value, int) and value in (0, 1):
        return bool(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
