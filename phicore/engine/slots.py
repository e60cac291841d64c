"""The arrays on the device with which sequences are computed: caches, and inputs of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from phicore.backend import Array, Backend, LayerCache
from phicore.backend.shapes import power_of_two
from phicore.engine.request import Request
from phicore.engine.steps import Kinds, Place, States
from phicore.errors import PhicoreError
from phicore.network import sampler
from phicore.network.processors import LogitsProcessor, check_same

MIN_RECENT = 64
"""The smallest number of recent tokens that a row stores, so that few sizes are compiled."""
ENDS = 8
"""The number of end tokens of a row is padded to a multiple of this."""


@dataclass
class Cache:
    """The caches of all layers for B rows, and the positions that they hold.

    A cache has slots for all tokens or, if the model has a window, for the window and one chunk.
    When a cache of a model with a window is full, the slots of tokens that no later token sees are
    freed, and slot 0 then holds a later position. Keys need no change for that, since they were
    rotated when they were stored.

    Attributes:
        layers: The cache of each layer.
        capacity: S, the number of slots of a row.
        first: The position in slot 0 of each row, (B,) int32 on the host.
        rope_start: The row of the rotary tables for position 0, (B,) int32 on the host.
        place: `first` and `rope_start` on the device.
    """

    ops: Backend
    layers: list[LayerCache]
    capacity: int
    rope_start: np.ndarray

    def __post_init__(self) -> None:
        self.first = np.zeros_like(self.rope_start)
        self._set_place()

    def _set_place(self) -> None:
        asarray = self.ops.asarray
        self.place: Place = {"first": asarray(self.first), "rope_start": asarray(self.rope_start)}

    def lacks(self, starts: np.ndarray, count: int) -> bool:
        """Return whether a row lacks slots for `count` tokens from its position in `starts` on."""
        return bool((starts + count - self.first > self.capacity).any())

    def grow(self, capacity: int) -> None:
        """Grow the cache to this capacity, if it is smaller."""
        if capacity > self.capacity:
            self.layers = [self.ops.grow_cache(layer, capacity) for layer in self.layers]
            self.capacity = capacity

    def unseen(self, starts: np.ndarray, count: int, window: int) -> np.ndarray:
        """Return how many slots each row can free, (B,) int32; 0 for a row that has room.

        Args:
            starts: The position of the next token in each row, (B,).
            count: The number of tokens to make room for.
            window: The number of positions that a token sees.
        """
        is_full = starts + count - self.first > self.capacity
        return np.where(is_full, starts - (window - 1) - self.first, 0).astype(np.int32)

    def freed(self, layers: list[LayerCache], counts: np.ndarray) -> None:
        """Replace the layers by layers in which the first `counts` (B,) slots were freed."""
        self.layers = layers
        self.first = self.first + counts
        self._set_place()


@dataclass
class Slots:
    """The cache of B requests, and the arrays for their next step.

    Attributes:
        states: The states of the rows' logits processors.
        penalty, draw: Arguments of `sampler.sample`, without the random numbers.
        ends: The tokens that end each row, (B, any) int32, padded with -1.
        only: Zeros, (B,) int32: the index of the last token in a step of one token.
        token, position: The last token that was sampled and its position, (B, 1) int32.
        pending: Tokens (B, N) that the host has not read yet, each with the number of tokens that
            were requested.
    """

    cache: Cache
    requests: Sequence[Request]
    states: States
    penalty: dict[str, Array]
    draw: dict[str, Array] | None
    ends: Array
    only: Array
    token: Array = None
    position: Array = None
    pending: list[tuple[Array, int]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        cache: Cache,
        requests: Sequence[Request],
        limits: Sequence[int],
        *,
        vocab_size: int,
        context: int,
    ) -> Slots:
        """Make the rows of requests, which must have processors of the same classes.

        Args:
            limits: The largest number of tokens of each answer.
        """
        ops = cache.ops
        draw = sampler.inputs([request.sampling for request in requests])
        return cls(
            cache,
            requests,
            _states(ops, requests, vocab_size),
            _penalty(ops, requests, limits, context),
            draw and {name: ops.asarray(array) for name, array in draw.items()},
            _ends(ops, requests),
            ops.asarray(np.zeros(len(requests), np.int32)),
        )

    @property
    def kinds(self) -> Kinds:
        """Return the classes of the rows' logits processors."""
        return tuple(type(p) for p in self.requests[0].processors)

    def tell(self, token: int) -> None:
        """Give the token that the next step begins with to the processors that need it."""
        ops = self.cache.ops
        for number, processor in enumerate(self.requests[0].processors):
            if processor.needs_tokens:
                old = self.states[number]
                new = {**old, **_arrays(ops, processor, [processor.update(token)])}
                check_same(f"{type(processor).__name__}.update", old, new)
                self.states[number] = new


def _states(ops: Backend, requests: Sequence[Request], vocab_size: int) -> States:
    states: States = []
    for alike in zip(*(request.processors for request in requests), strict=True):
        found = [
            processor.start(request.prompt_ids, vocab_size)
            for processor, request in zip(alike, requests, strict=True)
        ]
        states.append(_arrays(ops, alike[0], found))
    return states


def _arrays(
    ops: Backend, processor: LogitsProcessor, rows: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Array]:
    """Copy the states of rows to the device.

    Raises:
        PhicoreError: If an array has numbers of 64 bits, which not every library has.
    """
    arrays = {}
    for name in rows[0]:
        values = np.stack([row[name] for row in rows])
        if values.dtype.itemsize > 4:
            raise PhicoreError(
                f"{type(processor).__name__}: {name!r} of its state is {values.dtype}, "
                "expected numbers of 32 bits or fewer"
            )
        arrays[name] = ops.asarray(values)
    return arrays


def _penalty(
    ops: Backend, requests: Sequence[Request], limits: Sequence[int], context: int
) -> dict[str, Array]:
    counts = []
    for request, limit in zip(requests, limits, strict=True):
        sampling = request.sampling
        last_n = sampling.repeat_last_n if sampling.has_penalty else 0
        is_all = last_n < 0 or last_n > context
        counts.append(len(request.prompt_ids) + limit if is_all else last_n)
    size = max(MIN_RECENT, power_of_two(max(counts)))
    recent = np.full((len(requests), size), -1, np.int32)
    for row, request in zip(recent, requests, strict=True):
        known = request.prompt_ids[-size:]
        row[size - len(known) :] = known
    return {
        "recent": ops.asarray(recent),
        "last_n": ops.asarray(np.array(counts, np.int32)),
        "repeat_penalty": ops.asarray(
            np.array([r.sampling.repeat_penalty for r in requests], np.float32)
        ),
    }


def _ends(ops: Backend, requests: Sequence[Request]) -> Array:
    room = -(-max(1, *(len(r.ends) for r in requests)) // ENDS) * ENDS
    ends = np.full((len(requests), room), -1, np.int32)
    for row, request in zip(ends, requests, strict=True):
        row[: len(request.ends)] = sorted(request.ends)
    return ops.asarray(ends)
