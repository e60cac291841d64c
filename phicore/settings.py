"""Settings: frozen dataclasses whose fields have a default, help text and a check.

The command line derives its options from these fields, so a setting is described in one place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any

from phicore.errors import ArgumentError


def setting(
    default: Any,
    help: str,
    *,
    expected: str | None = None,
    check: Callable[[Any], bool] = lambda value: True,
    flags: tuple[str, ...] = (),
    metavar: str | None = None,
    shown_default: str | None = None,
) -> Any:
    """Make a field of a frozen dataclass whose `__post_init__` calls `check_settings`.

    Args:
        default: The field's default.
        help: The help text, in complete sentences.
        expected: A description of the allowed values, for error messages.
        check: Returns whether a value of the right type is allowed.
        flags: Other names of the option on the command line, such as `-t`.
        metavar: The placeholder for the value in help texts.
        shown_default: The description of the default in help texts.
    """
    metadata = {
        "help": help,
        "expected": expected,
        "check": check,
        "flags": flags,
        "metavar": metavar,
        "shown_default": shown_default,
    }
    return field(default=default, metadata=metadata)


_TYPES: dict[str, type] = {"int": Integral, "float": Real, "bool": bool, "str": str}
# NumPy's numbers are also Integral and Real.


def check_settings(settings: Any) -> None:
    """Check every field of a dataclass against its type and its `check`.

    Raises:
        ArgumentError: If a value is not allowed. `parameter`, `expected` and `got` describe the
            first such value.
    """
    for each in fields(settings):
        value = getattr(settings, each.name)
        name, _, optional = str(each.type).partition(" | ")
        if value is None and optional == "None":
            continue
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool) != (name == "bool"):
            raise ArgumentError(parameter=each.name, expected=str(each.type), got=value)
        if not each.metadata["check"](value):
            expected = each.metadata["expected"]
            raise ArgumentError(parameter=each.name, expected=expected, got=value)


def bytes_of(text: str) -> int | None:
    """Return the number of bytes that a text such as "4GB" or "500 MB" says; None if it says none.

    The units are decimal.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]?)B?", text.strip())
    if found is None:
        return None
    return int(float(found[1]) * 1000 ** " kMGT".index(found[2] or " "))
