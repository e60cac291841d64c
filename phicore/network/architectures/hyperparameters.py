"""Typed access to an architecture's keys in GGUF metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from phicore.errors import GGUFError
from phicore.values import as_kind


@dataclass(frozen=True)
class Hyperparameters:
    """Reads numbers from a file's metadata by their names in the reference's configuration.

    Attributes:
        arch: The architecture's name, with which the keys begin.
        keys: The rest of the key for each name.
        metadata: The file's metadata.
    """

    arch: str
    keys: Mapping[str, str]
    metadata: Mapping[str, Any]

    def key(self, name: str) -> str:
        """Return the complete GGUF key of a name."""
        return f"{self.arch}.{self.keys[name]}"

    def __contains__(self, name: str) -> bool:
        return self.key(name) in self.metadata

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """Read an integer from `minimum` to 2**31 - 1.

        Raises:
            GGUFError: If the value is not such an integer, or is missing without a default.
        """
        value = as_kind(self._get(name, default), int)
        if isinstance(value, bool) or not isinstance(value, int):
            raise GGUFError(f"{self.key(name)}: expected an integer, found {short(value)}")
        if not minimum <= value < 2**31:
            raise GGUFError(f"{self.key(name)}: expected {minimum} to {2**31 - 1}, found {value}")
        return value

    def number(
        self,
        name: str,
        default: float | None = None,
        minimum: float = 1e-30,
        maximum: float = 1e30,
    ) -> float:
        """Read a number from `minimum` to `maximum`.

        The default bounds make it positive, and leave float32 room for products and quotients.

        Raises:
            GGUFError: If the value is not such a number, or is missing without a default.
        """
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise GGUFError(f"{self.key(name)}: expected a number, found {short(value)}")
        if not minimum <= value <= maximum:  # false for NaN too
            raise GGUFError(f"{self.key(name)}: expected {minimum:g} to {maximum:g}, found {value}")
        return float(value)

    def _get(self, name: str, default: Any) -> Any:
        value = self.metadata.get(self.key(name), default)
        if value is None:
            raise GGUFError(
                f"{self.key(name)}: missing; the file is incomplete or was made for another use"
            )
        if not isinstance(value, (list, np.ndarray)) or not len(value):
            return value
        first, *others = listed(value)
        if any(other != first for other in others):
            raise GGUFError(
                f"{self.key(name)}: expected one number for all layers, found {short(value)}"
            )
        return first


def listed(value: Any) -> list[Any]:
    """Return the numbers of an array, or a value that is no array, as a list.

    Some converters write one number for each layer. None gives an empty list.
    """
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def short(value: Any) -> str:
    """Return the repr of a value for a message, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
