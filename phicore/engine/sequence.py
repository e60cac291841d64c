"""One sequence under way: the cache of its positions, and the arguments of its next step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from phicore.backend import Array
from phicore.backend.shapes import power_of_two
from phicore.engine.shapes import chunks
from phicore.engine.timings import Timings
from phicore.errors import PhicoreError
from phicore.network import sampler
from phicore.network.processors import LogitsProcessor, check_same, needs_tokens
from phicore.network.sampler import Sampling

if TYPE_CHECKING:
    from phicore.engine.engine import Engine

MIN_RECENT = 64
EXPECTED_ANSWER = 512  # tokens that a new cache has room for at once, if so many are asked for


class SequenceCache:
    """The keys and values of a sequence, and the rotation of its positions.

    It has room for all positions or, where the model has a window, for the window and a chunk
    more: when it is full, those that no token will see again are forgotten, and the slots count
    from a later position. Keys were rotated by their positions when they came, so nothing of them
    has to change.

    Attributes:
        layers: What the graph takes.
        rope: The tables of the positions that the slots are for.
        first: The position in slot 0.
    """

    def __init__(self, engine: Engine, positions: int, planned: int) -> None:
        self._engine = engine
        # Decided once: a sequence that is to grow beyond the original context begins so.
        self._is_long = engine.is_long(planned)
        self.first = 0
        self.capacity = engine.capacity_for(positions)
        self.layers = engine.new_cache(self.capacity)
        self._set_rope()

    def _set_rope(self) -> None:
        self.rope = self._engine.rope(self.first, self.capacity, self._is_long)

    def make_room(self, start: int, count: int, position: Array = None) -> Array:
        """See that `count` positions from `start` on have slots; all before them are there.

        Args:
            position: (B, 1) int32, of the next token, counted from `first`.
        Returns:
            It, counted from the new `first`.
        """
        engine, end = self._engine, int(start) + count - self.first
        if end <= self.capacity:
            return position
        capacity = engine.capacity_for(end)
        if capacity > self.capacity:
            self.layers = [engine.ops.grow_cache(layer, capacity) for layer in self.layers]
            self.capacity = capacity
        if end > capacity:
            assert engine.window is not None
            unseen = int(start) - (engine.window - 1) - self.first
            if position is None:
                position = engine.ops.asarray(np.zeros((1, 1), np.int32))
            self.layers, position = engine.shifted(self.layers, position, unseen)
            self.first += unseen
        self._set_rope()
        return position


class TokenSequence:
    """A sequence under way: its cache, and the arguments of its next step.

    Attributes:
        sampled: (1, N) int32, what the last call has sampled, perhaps not computed yet.
        count: How many of them were wanted; beyond an end they mean nothing.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        sampling: Sampling,
        processors: Sequence[LogitsProcessor],
        *,
        limit: int,
        seed: int,
        timings: Timings,
        ends: Collection[int],
    ) -> None:
        self._engine = engine
        self._processors = processors
        self._kinds = tuple(type(p) for p in processors)
        self._states = [self._arrays(p, p.start(prompt, engine.vocab_size)) for p in processors]
        self.needs_tokens = any(map(needs_tokens, processors))
        self._seed = seed
        self._timings = timings
        self._index = 0  # of the token that is sampled next
        self._length = len(prompt)
        planned = len(prompt) + limit
        self._cache = SequenceCache(engine, len(prompt) + min(limit, EXPECTED_ANSWER), planned)
        self._only = engine.ops.asarray(np.zeros(1, np.int32))  # the index of a single token
        room = -(-max(len(ends), 1) // 8) * 8  # few shapes, since each is compiled
        padded = np.full(room, -1, np.int32)
        padded[: len(ends)] = sorted(ends)
        self._ends = engine.ops.asarray(padded)
        self._penalty = self._penalty_inputs(prompt, sampling, limit)
        self._draw = self._draw_inputs(sampling)

    def prefill(self, prompt: Sequence[int]) -> None:
        """Fill the cache with the prompt, and sample the first token."""
        asarray, engine = self._engine.ops.asarray, self._engine
        penalty, states, done, token = self._penalty, self._states, 0, None
        engine.progress("prompt", done, len(prompt))
        sizes = engine.ops.prompt_chunks
        for tokens, positions, last in chunks(prompt, sizes, is_padded=engine.is_padded):
            # Every chunk samples a token; only the last one's counts.
            self._penalty, self._states = penalty, states
            self._cache.make_room(positions[0, 0], tokens.shape[1])
            self._run(asarray(tokens), asarray(positions - self._cache.first), asarray(last))
            if token is not None:  # that of the chunk before: it is in the cache when this is read
                engine.ops.to_numpy(token)
                engine.progress("prompt", done, len(prompt))
            done, token = int(positions[0, last[0]]) + 1, self._token
        self._index = 1

    def decode(self, most: int) -> None:
        """Run the last token, and sample the next ones: as many as a call does, `most` at most."""
        steps = self._engine.ops.steps
        count = 1 if self.needs_tokens else min(most, steps)
        position = self._cache.make_room(self._length + self._index - 1, count, self._position)
        if steps == 1:
            self._run(self._token, position, self._only)
        else:
            self._run_steps(position, count)
        self._index += count

    def _run(self, tokens: Array, positions: Array, last: Array) -> None:
        draw = None if self._draw is None else {**self._draw, "uniforms": self._uniforms(1)}
        args = (tokens, positions, last, self._penalty, draw, self._states)
        engine = self._engine
        self._cache.layers, self._token, self._position, recent, self._states = engine.call(
            engine.step(self._kinds), self._cache, args, self._timings
        )
        self._penalty = {**self._penalty, "recent": recent}
        self.sampled, self.count = self._token, 1

    def _run_steps(self, position: Array, count: int) -> None:
        engine, draw = self._engine, self._draw
        if draw is not None:
            draw = {**draw, "uniforms": self._uniforms(count, engine.ops.steps)}
        wanted = engine.ops.asarray(np.array([count], np.int32))
        args = (self._token, position, self._penalty, draw, self._states, wanted, self._ends)
        (
            self._cache.layers,
            self._token,
            self._position,
            recent,
            self._states,
            self.sampled,
        ) = engine.call(engine.steps(self._kinds), self._cache, args, self._timings)
        self._penalty = {**self._penalty, "recent": recent}
        self.count = count

    def _uniforms(self, count: int, room: int | None = None) -> Array:
        """Numbers to draw with: (1, V), or (room, 1, V) of which `count` are used."""
        size = self._engine.vocab_size
        numbers = np.zeros((room or 1, size), np.float32)
        for i in range(count):
            numbers[i] = sampler.uniforms(self._seed, self._index + i, size)
        return self._engine.ops.asarray(numbers if room is None else numbers[:, None])

    def tell(self, token: int) -> None:
        """Let processors that ask for it know the token that the next step begins with."""
        if self.needs_tokens:
            for number, processor in enumerate(self._processors):
                old = self._states[number]
                new = {**old, **self._arrays(processor, processor.update(token))}
                check_same(f"{type(processor).__name__}.update", old, new)
                self._states[number] = new

    def _arrays(
        self, processor: LogitsProcessor, state: Mapping[str, np.ndarray]
    ) -> dict[str, Array]:
        """A state on the device. Not every library has numbers of 64 bits, and some cut them."""
        for name, values in state.items():
            if values.dtype.itemsize > 4:
                raise PhicoreError(
                    f"{type(processor).__name__}: {name!r} of its state is {values.dtype}, "
                    "expected numbers of 32 bits or fewer"
                )
        return {name: self._engine.ops.asarray(values) for name, values in state.items()}

    def _penalty_inputs(
        self, prompt: Sequence[int], sampling: Sampling, limit: int
    ) -> dict[str, Array]:
        last_n = sampling.repeat_last_n if sampling.has_penalty else 0
        if last_n < 0 or last_n > self._engine.context:
            last_n = len(prompt) + limit
        size = max(MIN_RECENT, power_of_two(last_n))
        recent = np.full((1, size), -1, np.int32)
        known = prompt[-size:]
        recent[0, size - len(known) :] = known
        return {
            "recent": self._engine.ops.asarray(recent),
            "last_n": self._engine.ops.asarray(np.array([last_n], np.int32)),
            "repeat_penalty": self._floats(sampling.repeat_penalty),
        }

    def _draw_inputs(self, sampling: Sampling) -> dict[str, Array] | None:
        if sampling.is_greedy:
            return None
        draw = {"temperature": self._floats(sampling.temperature)}
        if sampling.has_filter:
            draw["top_k"] = self._engine.ops.asarray(np.array([sampling.top_k], np.int32))
            draw["top_p"] = self._floats(sampling.top_p)
            draw["min_p"] = self._floats(sampling.min_p)
        return draw

    def _floats(self, value: float) -> Array:
        return self._engine.ops.asarray(np.array([value], np.float32))
