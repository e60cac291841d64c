"""The smallest possible backend: the required part of the protocol, on the listed functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import array_api_strict
import numpy as np

from phicore.backend import (
    DEFAULTS,
    DTYPES,
    FUNCTIONS,
    Array,
    Backend,
    BackendOptions,
    Capabilities,
)

array_api_strict.set_array_api_strict_flags(api_version="2024.12")


class ListedNames:
    """A view of a namespace with only the listed names; it records which of them were used."""

    def __init__(self, namespace: Any, names: Collection[str]) -> None:
        self._namespace = namespace
        self._names = names
        self.used: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(f"xp.{name} is not in the list of protocol.py")
        self.used.add(name)
        return getattr(self._namespace, name)


class StrictBackend(Backend):
    """The protocol on array-api-strict, which implements only what the standard specifies."""

    def __init__(self, options: BackendOptions = DEFAULTS) -> None:
        super().__init__(options, Capabilities(cache_types=("f32", "i16")))
        # int16 is needed for the cache type `i16`, uint32 for random numbers
        self.xp = ListedNames(array_api_strict, {*FUNCTIONS, *DTYPES, "int16", "uint32"})

    def asarray(self, x: np.ndarray) -> Array:
        return array_api_strict.asarray(x, copy=True)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.array(x)

    def compile(self, fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with np.errstate(all="ignore"):  # array-api-strict computes with NumPy, which warns
                return fn(*args)

        return run
