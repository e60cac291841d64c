"""The compiled steps of a model. Each step is compiled when it is first needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from phicore.backend import Array, Backend, LayerCache, Params
from phicore.engine.slots import Cache
from phicore.engine.steps import Kinds, Steps
from phicore.engine.timings import Timings
from phicore.network.rope import Tables
from phicore.progress import Progress


class Compiled:
    """Calls compiled steps, reports when one is being compiled, and measures the time of that.

    Attributes:
        pure: The functions to compile.
    """

    def __init__(self, ops: Backend, pure: Steps, params: Params, progress: Progress) -> None:
        self.pure = pure
        self._ops = ops
        self._params = params
        self._progress = progress
        self._functions: dict[tuple[str, Kinds], Callable[..., Any]] = {}
        self._called: set[Any] = set()

    def step(self, kinds: Kinds) -> Callable[..., Any]:
        """Return the compiled `Steps.step` for these processor classes."""
        return self._function("step", kinds)

    def steps(self, kinds: Kinds) -> Callable[..., Any]:
        """Return the compiled `Steps.steps` for these processor classes."""
        return self._function("steps", kinds)

    def score(self) -> Callable[..., Any]:
        """Return the compiled `Steps.score`."""
        return self._function("score", None)

    def _function(self, name: str, kinds: Kinds | None) -> Callable[..., Any]:
        key = name, kinds or ()
        if key not in self._functions:
            function = getattr(self.pure, name)
            if kinds is not None:
                function = partial(function, kinds)
            self._functions[key] = self._ops.compile(function, donate=(1,))
        return self._functions[key]

    def run(
        self,
        function: Callable[..., Any],
        cache: Cache,
        tables: Tables,
        args: tuple[Any, ...],
        timings: Timings,
    ) -> Any:
        """Call a compiled function.

        On a backend that compiles, the time of the first call with new shapes is counted as
        compile time.

        Args:
            args: The function's arguments after `place`. The first must be the tokens (B, T).
        """
        ops = self._ops.capabilities
        most, tokens = ops.compiled_tokens, args[0]
        is_compiled = ops.compiles and (most is None or tokens.shape[1] <= most)
        key = (function, cache.capacity, *map(_shapes, (tables[0], *args)))
        args = (self._params, cache.layers, tables, cache.place, *args)
        if not is_compiled or key in self._called:
            return function(*args)
        self._progress("compiling", 0, 1)
        started = time.perf_counter()
        result = function(*args)
        timings.compile_s += time.perf_counter() - started
        self._called.add(key)
        self._progress("compiling", 1, 1)
        return result

    def shift(self, layers: list[LayerCache], counts: np.ndarray) -> list[LayerCache]:
        """Free the first `counts` (B,) slots of each row."""
        key = "shift", ()
        if key not in self._functions:
            self._functions[key] = self._ops.compile(self.pure.shift, donate=(0,))
        count: Array = self._ops.asarray(counts)
        return self._functions[key](layers, count)


def _shapes(arg: Any) -> Any:
    """Return the part of an argument that decides on recompiling: shapes, and names or None."""
    if isinstance(arg, list):
        return tuple(map(_shapes, arg))
    if isinstance(arg, dict):
        return tuple((name, tuple(value.shape)) for name, value in sorted(arg.items()))
    return None if arg is None else tuple(arg.shape)
