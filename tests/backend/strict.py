"""A backend that has only what the protocol lists: it shows what the defaults, the graph and the
sampler ask of a library."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import array_api_strict
import numpy as np

from phicore import protocol
from phicore.protocol import Array, Backend

array_api_strict.set_array_api_strict_flags(api_version="2024.12")


def listed_functions() -> tuple[str, ...]:
    """The functions that the protocol's text says `xp` has."""
    found = re.search(r"names and meanings:\n(.*?)\nand its dtypes", protocol.__doc__ or "", re.S)
    assert found is not None, "the list is gone from the text of protocol.py"
    return tuple(found[1].split())


def listed_dtypes() -> tuple[str, ...]:
    """The dtypes that the protocol's text says `xp` has."""
    found = re.search(r"and its dtypes (.*?)\. ", protocol.__doc__ or "", re.S)
    assert found is not None, "the dtypes are gone from the text of protocol.py"
    return tuple(re.findall(r"\w+", found[1].replace(" and ", " ")))


class ListedNames:
    """A namespace that has the listed names only, and remembers which were used."""

    def __init__(self, namespace: Any, names: tuple[str, ...]) -> None:
        self._namespace = namespace
        self._names = names
        self.used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(f"xp.{name} is not in the list of protocol.py")
        self.used.add(name)
        return getattr(self._namespace, name)


class StrictBackend(Backend):
    """The smallest backend there can be, on array-api-strict, which does nothing unspecified."""

    cache_types = ("f32", "i16")

    def __init__(self) -> None:
        names = (*listed_functions(), *listed_dtypes(), "int16")  # for caches of `i16`
        self.xp = ListedNames(array_api_strict, names)

    def asarray(self, x: np.ndarray) -> Array:
        return array_api_strict.asarray(x, copy=True)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x)

    def compile(self, fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with np.errstate(over="ignore"):  # a warning that only NumPy underneath has
                return fn(*args)

        return run
