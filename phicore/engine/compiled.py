"""The compiled steps of a model. Each step is compiled when it is first needed."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from phicore.backend import Backend, KeptProgram, LayerCache, ProgramStore
from phicore.engine.cache import Cache
from phicore.engine.identities import identity_of
from phicore.engine.loading import Weights
from phicore.engine.steps import States, Steps
from phicore.engine.timings import Timings
from phicore.network.processors import Kinds
from phicore.network.rope import Tables
from phicore.progress import Progress

MOST_HELD = 128
"""The largest number of compiled functions that are held. On a CPU, XLA gives each of its 40
kernels three parts of the 65,530 that the memory of a process may have on Linux."""
MOST_HELD_BYTES = 2**30
"""The most memory of held functions that are kept for later processes. One that was dropped is
found again in some 0.1 s. A step of a model with 30 layers takes 16 to 22 MB. 48 chats,
eight at a time, needed 26. A server that is asked for everything would use thousands."""
Function = Callable[[], Callable[..., Any]]
"""A function of `Steps`. A call returns it anew, to be compiled for arguments of one form."""


class Compiled:
    """Calls compiled steps, reports when one is being compiled, and measures the time of that.

    Attributes:
        pure: The functions to compile.
        progress: Called when a function is compiled.
        held_bytes: About how much memory the held functions take, as far as the backend tells.
    """

    def __init__(
        self,
        ops: Backend,
        pure: Steps,
        weights: Weights,
        progress: Progress,
        programs: ProgramStore | None = None,
    ) -> None:
        """Make the compiled steps.

        Args:
            programs: What keeps compiled functions for later processes; None keeps nothing.
        """
        self.pure = pure
        self._programs = programs
        self._ops = ops
        self._weights = weights
        self.progress = progress
        self.held_bytes = 0
        self._functions: dict[tuple[str, Kinds, bool], Function] = {}
        self._called: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self._other: dict[Function, Callable[..., Any]] = {}
        self._prepared: dict[Any, KeptProgram] = {}

    def step(self, kinds: Kinds, *, has_logprobs: bool = False) -> Function:
        """Return the compiled `Steps.step` for these processor classes."""
        return self._function("step", kinds, has_logprobs)

    def steps(self, kinds: Kinds, *, has_logprobs: bool = False) -> Function:
        """Return the compiled `Steps.steps` for these processor classes."""
        return self._function("steps", kinds, has_logprobs)

    def verify(self, kinds: Kinds, *, has_logprobs: bool = False) -> Function:
        """Return the compiled `Steps.verify` for these processor classes."""
        return self._function("verify", kinds, has_logprobs)

    def guess(self) -> Function:
        """Return the compiled `Steps.guess`."""
        return self._function("guess", None)

    def logits(self) -> Function:
        """Return the compiled `Steps.logits`."""
        return self._function("logits", None)

    def score(self) -> Function:
        """Return the compiled `Steps.score`."""
        return self._function("score", None)

    def score_tokens(self) -> Function:
        """Return the compiled `Steps.score_tokens`."""
        return self._function("score_tokens", None)

    def _function(
        self,
        name: str,
        kinds: Kinds | None,
        has_logprobs: bool = False,
        donate: Sequence[int] = (1,),
    ) -> Function:
        key = name, kinds or (), has_logprobs
        if key not in self._functions:
            function = getattr(self.pure, name)
            if kinds is not None:
                function = partial(function, kinds)
            if has_logprobs:
                function = partial(function, has_logprobs=True)
            identity = None if self._programs is None else identity_of(self.pure, *key)
            if self._programs is None or identity is None:
                self._functions[key] = partial(self._ops.compile, function, donate=donate)
            else:
                self._functions[key] = partial(self._programs.compile, function, donate, identity)
        return self._functions[key]

    def run(
        self,
        function: Function,
        cache: Cache,
        tables: Tables,
        args: tuple[Any, ...],
        timings: Sequence[Timings] = (),
    ) -> Any:
        """Call a compiled function. The weights are waited for while it is compiled.

        On a backend that compiles, the time of the first call with new shapes is counted as
        compile time.

        Args:
            args: The function's arguments after `place`. The first must be the tokens (B, T).
            timings: The times of the sequences that wait for it.
        """
        key, weights = self._key(function, cache, tables, args), self._weights
        args = (cache.layers, tables, cache.place, *args)
        if not weights.are_loaded:
            self._prepare(key, function, (weights.forms, *args))
        return self._call(key, function, (weights.get(self.progress), *args), timings)

    @property
    def keeps(self) -> bool:
        """Return whether compiled functions are kept for later processes."""
        return self._programs is not None

    def prepare(
        self, function: Function, cache: Cache, tables: Tables, args: tuple[Any, ...]
    ) -> None:
        """Begin to compile a function in a thread, if compiled functions are kept.

        Args:
            args: Arguments of `run`, of the form that a later call has.
        """
        key = self._key(function, cache, tables, args)
        args = (self._weights.forms, cache.layers, tables, cache.place, *args)
        self._prepare(key, function, args)

    def prepare_pick(self, kinds: Kinds, args: tuple[Any, ...], *, has_logprobs: bool) -> None:
        """Begin to compile `Steps.pick` in a thread; see `prepare` and `pick`."""
        function = self._function("pick", kinds, has_logprobs, donate=())
        self._prepare(self._plain_key(function, args), function, args)

    def _prepare(self, key: Any, function: Function, args: tuple[Any, ...]) -> None:
        if key is None or key in self._called or key in self._prepared or not self.keeps:
            return
        program = function()
        if isinstance(program, KeptProgram):
            program.prepare(*args)
            self._prepared[key] = program
            if len(self._prepared) > MOST_HELD:  # what was foreseen and did not come
                del self._prepared[next(iter(self._prepared))]

    def _key(self, function: Function, cache: Cache, tables: Tables, args: tuple[Any, ...]) -> Any:
        """Return what tells one compiled function from others; None if it is not compiled."""
        ops = self._ops.capabilities
        most, tokens = ops.compiled_tokens, args[0]
        if not ops.compiles or (most is not None and tokens.shape[1] > most):
            return None
        return (function, cache.capacity, *map(_shapes, (tables[0], *args)))

    def pick(
        self, kinds: Kinds, args: tuple[Any, ...], timings: Sequence[Timings], *, has_logprobs: bool
    ) -> Any:
        """Call the compiled `Steps.pick`."""
        function = self._function("pick", kinds, has_logprobs, donate=())
        return self._call(self._plain_key(function, args), function, args, timings)

    def _plain_key(self, function: Function, args: tuple[Any, ...]) -> Any:
        """Return `_key` for a function that takes neither weights nor tables."""
        return (function, *map(_shapes, args)) if self._ops.capabilities.compiles else None

    def _call(
        self,
        key: Any,
        function: Function,
        args: tuple[Any, ...],
        timings: Sequence[Timings] = (),
    ) -> Any:
        """Call a function, and report compiling if this is the first call with a key."""
        if key is None:
            if function not in self._other:
                self._other[function] = function()
            return self._other[function](*args)
        if (known := self._called.get(key)) is not None:
            self._called.move_to_end(key)
            return known(*args)
        self.progress("compiling", 0, 1)
        started = time.perf_counter()
        compiled = self._prepared.pop(key, None) or function()
        result = compiled(*args)
        for each in timings:
            each.compile_s += time.perf_counter() - started
        self._called[key] = compiled
        self._drop()
        self.progress("compiling", 1, 1)
        return result

    def _drop(self) -> None:
        """Drop functions that were not called for the longest time, if too many are held."""
        sizes = [getattr(each, "memory_bytes", 0) for each in self._called.values()]
        held, count = sum(sizes), len(sizes)
        for size in sizes[:-1]:
            if count <= MOST_HELD and held <= MOST_HELD_BYTES:
                break
            self._called.popitem(last=False)
            held, count = held - size, count - 1
        self.held_bytes = held

    def shift(self, layers: list[LayerCache], counts: np.ndarray) -> list[LayerCache]:
        """Free the first `counts` (B,) slots of each row."""
        count = self._ops.asarray(counts)
        return [self._moved("shift", layer, count) for layer in layers]

    def insert(
        self, layers: list[LayerCache], row: list[LayerCache], index: int, slots: int
    ) -> list[LayerCache]:
        """Replace the row `index`, of which `slots` are in use; see `Backend.insert_row`."""
        args = [self._ops.asarray(np.array([number], np.int32)) for number in (index, slots)]
        pairs = zip(layers, row, strict=True)
        return [self._moved("insert", layer, one, *args) for layer, one in pairs]

    def take_states(self, states: States, rows: np.ndarray) -> States:
        """Return the states of logits processors with these indices (B,), in this order."""
        return self._moved("take", states, self._ops.asarray(rows), donate=())

    def put_states(self, states: States, row: States, index: int) -> States:
        """Replace the states of logits processors with the index by the only ones of `row`."""
        return self._moved("put", states, row, self._ops.asarray(np.array([index], np.int32)))

    def _moved(self, name: str, *args: Any, donate: Sequence[int] = (0,)) -> Any:
        """Call a function of `Steps` that moves slots, rows or states.

        Layers are moved one by one, so that little is compiled.
        """
        function = self._function(name, None, donate=donate)
        return self._call(self._plain_key(function, args), function, args)


def _shapes(arg: Any) -> Any:
    """Return the part of an argument that decides on recompiling: shapes, and names or None."""
    if isinstance(arg, list):
        return tuple(map(_shapes, arg))
    if isinstance(arg, Mapping):
        return tuple((name, tuple(value.shape)) for name, value in sorted(arg.items()))
    return None if arg is None else tuple(arg.shape)
