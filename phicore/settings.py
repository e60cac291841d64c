"""Settings: frozen dataclasses whose fields say what they mean, what they may be, and their help.

The command line makes its options of the same fields, so a setting is named in one place.
"""

from __future__ import annotations

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
    flag: str | None = None,
    metavar: str | None = None,
    shown_default: str | None = None,
) -> Any:
    """Make a field of a frozen dataclass whose `__post_init__` calls `check_settings`.

    Args:
        default: The field's default.
        help: What the setting does, in whole sentences.
        expected: What a value may be, for the error.
        check: Whether a value of the right type is one of these.
        flag: A short option of the command line, such as `-t`.
        metavar: What stands for the value in help texts.
        shown_default: What help texts call the default.
    """
    metadata = {
        "help": help,
        "expected": expected,
        "check": check,
        "flag": flag,
        "metavar": metavar,
        "shown_default": shown_default,
    }
    return field(default=default, metadata=metadata)


_TYPES: dict[str, type] = {"int": Integral, "float": Real, "bool": bool, "str": str}
# NumPy's numbers are Integral and Real, too.


def check_settings(settings: Any) -> None:
    """Check every field of a dataclass against its type and its `check`.

    Raises:
        ArgumentError: For the first value that is not allowed, with the fields of the error set.
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
