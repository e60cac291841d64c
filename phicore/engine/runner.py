"""The runner, which runs tokens on the device with caches, rotary tables and compiled steps."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

import numpy as np

from phicore.backend import Array, Backend, Params
from phicore.engine.chunks import (
    LOGITS_CHUNKS,
    Chunk,
    capacity_for,
    capacity_of_window,
    chunk_at,
    chunks,
)
from phicore.engine.compiled import Compiled
from phicore.engine.rope_tables import RopeTables
from phicore.engine.sequence import Sequence
from phicore.engine.slots import Cache, Slots
from phicore.engine.steps import Steps
from phicore.engine.timings import Timings
from phicore.network import sampler
from phicore.network.config import Phi3Config
from phicore.network.rope import RopeFactors
from phicore.progress import Progress, silent


class Runner:
    """Runs the tokens of one model on one backend.

    Attributes:
        ops: The backend.
        config: The hyperparameters of the part of the network that one device computes.
        params: The weights.
        steps: The compiled steps.
        tables: The rotary tables.
    """

    def __init__(
        self,
        ops: Backend,
        config: Phi3Config,
        params: Params,
        factors: RopeFactors | None = None,
        progress: Progress = silent,
    ) -> None:
        self.ops = ops
        self.config = config
        self.params = params
        self.steps = Compiled(ops, Steps(ops, config), params, progress)
        self.tables = RopeTables(ops, config, factors)

    # ---- steps -----------------------------------------------------------------------------

    def chunk_at(self, prompt: Tokens[int], start: int) -> Chunk:
        """Return the chunk of a prompt that begins at position `start`."""
        sizes = self.ops.capabilities.prompt_chunks
        return chunk_at(prompt, start, sizes, is_padded=self._is_padded)

    def read(self, sequence: Sequence, slots: Slots, chunk: Chunk) -> None:
        """Run a chunk of a sequence's prompt, and sample the token after it."""
        asarray = self.ops.asarray
        inputs = asarray(chunk.tokens), asarray(chunk.positions), asarray(chunk.last)
        self._step(sequence, slots, inputs, chunk.size)

    def decode(self, sequence: Sequence, slots: Slots, count: int) -> Array:
        """Run the last token of a sequence and sample `count` tokens in one call: (1, N) int32.

        N is `Capabilities.steps`, the number of steps of a call. Tokens after the first `count` are
        garbage.
        """
        most = self.ops.capabilities.steps
        if most == 1:
            self._step(sequence, slots, (slots.token, slots.position, slots.only), 1)
            return slots.token
        self.make_room(slots.cache, sequence.computed, count)
        draw = slots.draw and {**slots.draw, "uniforms": self._uniforms(sequence, count, most)}
        wanted = self.ops.asarray(np.array([count], np.int32))
        (
            slots.cache.layers,
            slots.token,
            slots.position,
            recent,
            slots.states,
            tokens,
        ) = self.steps.run(
            self.steps.steps(slots.kinds),
            slots.cache,
            self.tables.until(sequence.computed + count, sequence.is_long),
            (slots.token, slots.position, slots.penalty, draw, slots.states, wanted, slots.ends),
            sequence.timings,
        )
        slots.penalty = {**slots.penalty, "recent": recent}
        return tokens

    def _step(
        self, sequence: Sequence, slots: Slots, inputs: tuple[Array, Array, Array], count: int
    ) -> None:
        """Run tokens, and sample the next token.

        Args:
            inputs: Tokens and positions (1, T), and the index of the last token (1,).
            count: The number of tokens T.
        """
        self.make_room(slots.cache, sequence.computed, count)
        draw = slots.draw and {**slots.draw, "uniforms": self._uniforms(sequence)}
        (
            slots.cache.layers,
            slots.token,
            slots.position,
            recent,
            slots.states,
        ) = self.steps.run(
            self.steps.step(slots.kinds),
            slots.cache,
            self.tables.until(sequence.computed + count, sequence.is_long),
            (*inputs, slots.penalty, draw, slots.states),
            sequence.timings,
        )
        slots.penalty = {**slots.penalty, "recent": recent}

    def _uniforms(self, sequence: Sequence, count: int = 1, room: int | None = None) -> Array:
        """Make random numbers for the next `count` tokens.

        Returns:
            (1, V) float32 for one token if `room` is None; otherwise (room, 1, V) float32, with
            zeros after the first `count` tokens.
        """
        seed, size = sequence.request.seed, self.config.vocab_size
        assert seed is not None, "filled in by Request"
        numbers = np.zeros((room or 1, size), np.float32)
        for i in range(count):
            numbers[i] = sampler.uniforms(seed, sequence.sampled + i, size)
        return self.ops.asarray(numbers if room is None else numbers[:, None])

    def scores(self, tokens: Tokens[int]) -> np.ndarray:
        """Compute the scores of the next token after each token: (T, V) float32."""
        is_long = self.tables.is_long(len(tokens))
        cache = self.new_cache(len(tokens), is_long)
        rows = np.empty((len(tokens), self.config.vocab_size), np.float32)
        for chunk in chunks(tokens, LOGITS_CHUNKS, is_padded=self._is_padded):
            self.make_room(cache, chunk.start, chunk.size)
            cache.layers, scores = self.steps.run(
                self.steps.score(),
                cache,
                self.tables.until(chunk.start + chunk.size, is_long),
                (self.ops.asarray(chunk.tokens), self.ops.asarray(chunk.positions)),
                Timings(),
            )
            rows[chunk.start : chunk.end] = self.ops.to_numpy(scores)[0, : chunk.end - chunk.start]
        return rows

    # ---- caches ----------------------------------------------------------------------------

    @property
    def _is_padded(self) -> bool:
        """Return whether chunks are padded to few sizes. They are if every step is compiled."""
        ops = self.ops.capabilities
        return ops.compiles and ops.compiled_tokens is None

    def new_cache(self, positions: int, is_long: bool = False) -> Cache:
        """Make an empty cache of one row with slots for this many positions."""
        c, capacity = self.config, self._capacity_for(positions)
        layers = [
            self.ops.new_cache(1, c.num_key_value_heads, capacity, c.head_dim)
            for _ in range(c.num_hidden_layers)
        ]
        return Cache(self.ops, layers, capacity, np.array([self.tables.start(is_long)], np.int32))

    def _capacity_for(self, positions: int) -> int:
        """Return a capacity for this many positions, limited to what the window needs."""
        window, capacity = self.config.sliding_window, capacity_for(positions)
        if window is None:
            return capacity
        return min(capacity, capacity_of_window(window, self.ops.capabilities.prompt_chunks[-1]))

    def make_room(self, cache: Cache, start: int, count: int) -> None:
        """Ensure that the cache has slots for `count` tokens from position `start` on."""
        starts = np.array([start], np.int32)
        if not cache.lacks(starts, count):
            return
        cache.grow(self._capacity_for(start + count - int(cache.first.min())))
        if cache.lacks(starts, count):
            assert self.config.sliding_window is not None, "a cache without a window grows"
            counts = cache.unseen(starts, count, self.config.sliding_window)
            cache.freed(self.steps.shift(cache.layers, counts), counts)
