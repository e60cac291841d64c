"""The runner, which runs tokens on the device with caches, rotary tables and compiled steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from functools import cached_property
from typing import Any

import numpy as np

from phicore.backend import Array, Backend, Params, ProgramStore
from phicore.engine.cache import Cache, bytes_of
from phicore.engine.chunks import (
    LOGITS_CHUNKS,
    MIN_CAPACITY,
    Chunk,
    capacity_for,
    capacity_of_window,
    chunk_at,
    chunks,
)
from phicore.engine.compiled import Compiled, Function
from phicore.engine.loading import Weights
from phicore.engine.rope_tables import RopeTables
from phicore.engine.rows import Ahead, Rows
from phicore.engine.steps import Logprobs, Steps
from phicore.network import sampler
from phicore.network.config import Phi3Config
from phicore.network.rope import RopeFactors, Tables
from phicore.progress import Progress, silent


class Runner:
    """Runs the tokens of one model on one backend.

    Attributes:
        ops: The backend.
        config: The hyperparameters of the part of the network that one device computes.
        weights: The weights, which may still be on their way to the device.
        steps: The compiled steps.
        tables: The rotary tables.
    """

    def __init__(
        self,
        ops: Backend,
        config: Phi3Config,
        weights: Weights,
        factors: RopeFactors | None = None,
        progress: Progress = silent,
        programs: ProgramStore | None = None,
    ) -> None:
        self.ops = ops
        self.config = config
        self.weights = weights
        self.steps = Compiled(ops, Steps(ops, config), weights, progress, programs)
        self.tables = RopeTables(ops, config, factors)

    @property
    def params(self) -> Params:
        """Return the weights, and wait for them before."""
        return self.weights.get(self.steps.progress)

    # ---- steps -----------------------------------------------------------------------------

    def chunk_at(self, tokens: Tokens[int], start: int, most: int | None = None) -> Chunk:
        """Return the chunk of a sequence's tokens that begins at position `start`.

        Args:
            most: The largest size of the chunk, if the smallest sizes allow that. None sets none.
        """
        sizes = self.ops.capabilities.prompt_chunks
        if most is not None:
            sizes = tuple(size for size in sizes if size <= most) or sizes
            sizes = sizes if len(sizes) > 1 else self.ops.capabilities.prompt_chunks[:2]
        return chunk_at(tokens, start, sizes, is_padded=self._is_padded)

    def read(self, rows: Rows, chunk: Chunk, *, is_last: bool) -> None:
        """Run a chunk of the only row's tokens; after the last chunk, sample the next token.

        Before the last chunk, the logits stay in `rows.scores`. So the chunks are computed by the
        same compiled functions for all processors and sampling parameters. A chunk of one token is
        the step that decodes.
        """
        asarray = self.ops.asarray
        inputs = asarray(chunk.tokens), asarray(chunk.positions), asarray(chunk.last)
        if is_last and self._decodes(chunk.size):
            self._step(rows, inputs, 1)
            return
        starts = rows.positions(chunk.size)
        self.make_room(rows.cache, starts, chunk.size)
        self._run_logits(rows, starts + chunk.size, inputs)
        if is_last:
            self._pick(rows)

    def _decodes(self, size: int) -> bool:
        """Return whether the last chunk of a prompt, of this size, is the step that decodes."""
        return size == 1 and self.ops.capabilities.steps == 1

    def foresee_reading(self, rows: Rows, sizes: Tokens[int]) -> None:
        """Begin to compile what reads the only row's prompt.

        The first chunk is left to the call that comes next, unless this waits for the weights.

        Args:
            sizes: The sizes of the chunks, in order.
        """
        if not self.steps.keeps:
            return
        decodes = self._decodes(sizes[-1])
        first = 1 if self.weights.are_loaded else 0
        for size in sizes[first : -1 if decodes else None]:
            self._foresee_logits(rows, size)
        if not decodes:
            scores = self.ops.asarray(np.zeros((1, self.config.vocab_size), np.float32))
            args = scores, rows.penalty, self._draw(rows), rows.states
            self.steps.prepare_pick(rows.kinds, args, has_logprobs=rows.has_logprobs)
        elif len(sizes) > first:
            self._foresee_step(rows)

    def foresee_decoding(self, rows: Rows) -> None:
        """Begin to compile what decodes the only row, if a call runs one step."""
        if not self.steps.keeps or self.ops.capabilities.steps > 1:
            return
        if rows.needs_tokens:
            self._foresee_logits(rows, 1)
        else:
            self._foresee_step(rows)

    def _foresee_logits(self, rows: Rows, size: int) -> None:
        tokens = self.ops.asarray(np.zeros((1, size), np.int32))
        tables = self._tables(rows, rows.positions(1))
        self.steps.prepare(self.steps.logits(), rows.cache, tables, (tokens, tokens, rows.only))

    def _foresee_step(self, rows: Rows) -> None:
        tokens = self.ops.asarray(np.zeros((1, 1), np.int32))
        self.steps.prepare(
            self.steps.step(rows.kinds, has_logprobs=rows.has_logprobs),
            rows.cache,
            self._tables(rows, rows.positions(1)),
            (tokens, tokens, rows.only, rows.penalty, self._draw(rows), rows.states),
        )

    def decode(self, rows: Rows, count: int) -> Array:
        """Run the last token of each row and sample `count` tokens in one call: (B, N) int32.

        N is `Capabilities.steps`, the number of steps of a call. Tokens after the first `count` are
        garbage.
        """
        most = self.ops.capabilities.steps
        if rows.needs_tokens:
            self.look_ahead(rows)
            self._pick(rows)
            return rows.token
        starts = rows.positions(count)
        position = self.ops.asarray(starts[:, None])
        if most == 1:
            self._step(rows, (rows.token, position, rows.only), 1)
            return rows.token
        self.make_room(rows.cache, starts, count)
        draw = self._draw(rows, count, most)
        wanted = self.ops.asarray(np.array([count], np.int32))
        rows.cache.layers, rows.token, _, recent, rows.states, rows.logprobs, tokens = (
            self.steps.run(
                self.steps.steps(rows.kinds, has_logprobs=rows.has_logprobs),
                rows.cache,
                self._tables(rows, starts + count),
                (rows.token, position, rows.penalty, draw, rows.states, wanted, rows.ends),
                [sequence.timings for sequence in rows.live],
            )
        )
        rows.penalty = {**rows.penalty, "recent": recent}
        return tokens

    def look_ahead(self, rows: Rows) -> None:
        """Start to compute the logits of what follows the last tokens, unless they are computed.

        The host need not know these tokens yet. So a processor on the host learns of them, and
        tells what may follow, while the network runs.
        """
        if rows.scores is not None:
            return
        starts = rows.positions(1)
        self.make_room(rows.cache, starts, 1)
        inputs = rows.token, self.ops.asarray(starts[:, None]), rows.only
        self._run_logits(rows, starts + 1, inputs)

    def _run_logits(self, rows: Rows, ends: np.ndarray, inputs: tuple[Array, Array, Array]) -> None:
        """Run tokens, and keep the logits of what follows the last one of each row.

        Args:
            ends: The position after the last token of each row, (B,) int32.
            inputs: Tokens and positions (B, T), and the index of the last token (B,).
        """
        rows.cache.layers, rows.scores = self.steps.run(
            self.steps.logits(),
            rows.cache,
            self._tables(rows, ends),
            inputs,
            [sequence.timings for sequence in rows.live],
        )

    def _pick(self, rows: Rows) -> None:
        """Sample the next token of each row from the logits in `rows.scores`."""
        args = (rows.scores, rows.penalty, self._draw(rows), rows.states)
        timings = [sequence.timings for sequence in rows.live]
        rows.token, recent, rows.states, rows.logprobs = self.steps.pick(
            rows.kinds, args, timings, has_logprobs=rows.has_logprobs
        )
        rows.penalty = {**rows.penalty, "recent": recent}
        rows.scores = None

    def verify(self, rows: Rows, inputs: np.ndarray, ahead: Ahead) -> Array:
        """Run the last token and the draft of each row, and sample after each: (B, T) int32.

        The host must have read all tokens of the rows. `drafts.accepted` says which of the sampled
        tokens are the text; the rows are ready for what comes after these.

        Args:
            inputs: The tokens, (B, T) int32; see `drafts.inputs_of`.
            ahead: What the rows' logits processors tell ahead; see `Rows.ahead`.
        """
        count = inputs.shape[1]
        starts = rows.positions(count)
        self.make_room(rows.cache, starts, count)
        positions = starts[:, None] + np.arange(count, dtype=np.int32)
        tokens, places = self.ops.asarray(inputs), self.ops.asarray(positions)
        draw = self._draw(rows, count, count)
        rows.cache.layers, rows.token, recent, rows.states, rows.logprobs, sampled = self.steps.run(
            self.steps.verify(rows.kinds, has_logprobs=rows.has_logprobs),
            rows.cache,
            self._tables(rows, starts + count),
            (tokens, places, rows.penalty, draw, rows.states, ahead.states, ahead.is_told),
            [sequence.timings for sequence in rows.live],
        )
        rows.penalty = {**rows.penalty, "recent": recent}
        return sampled

    def _step(self, rows: Rows, inputs: tuple[Array, Array, Array], count: int) -> None:
        """Run tokens, and sample the next token of each row.

        Args:
            inputs: Tokens and positions (B, T), and the index of the last token (B,).
            count: The number of tokens T.
        """
        starts = rows.positions(count)
        self.make_room(rows.cache, starts, count)
        draw = self._draw(rows)
        rows.cache.layers, rows.token, _, recent, rows.states, rows.logprobs = self.steps.run(
            self.steps.step(rows.kinds, has_logprobs=rows.has_logprobs),
            rows.cache,
            self._tables(rows, starts + count),
            (*inputs, rows.penalty, draw, rows.states),
            [sequence.timings for sequence in rows.live],
        )
        rows.penalty = {**rows.penalty, "recent": recent}

    def _tables(self, rows: Rows, ends: np.ndarray) -> Tables:
        """Return rotary tables that have all positions below `ends` of each row."""
        pairs = zip(rows.sequences, ends.tolist(), strict=True)
        live = [(sequence.is_long, end) for sequence, end in pairs if sequence is not None]
        longest = max(live)  # the long part comes after the whole short part
        return self.tables.until(longest[1], longest[0])

    def _draw(self, rows: Rows, count: int = 1, room: int | None = None) -> dict[str, Array] | None:
        """Return the argument `draw` of the next step, or of the next `count` steps of a call."""
        if rows.draw is None:
            return None
        if not self.ops.capabilities.random_on_device:
            return {**rows.draw, "uniforms": self._uniforms(rows, count, room)}
        indices = [0 if sequence is None else sequence.sampled for sequence in rows.sequences]
        return {**rows.draw, "step": self.ops.asarray(np.array(indices, np.uint32))}

    def _uniforms(self, rows: Rows, count: int = 1, room: int | None = None) -> Array:
        """Make random numbers for the next `count` tokens of each row.

        They depend on the seed of a sequence and on the index of a token in its answer alone.

        Returns:
            (B, V) float32 for one token if `room` is None; otherwise (room, B, V) float32, with
            zeros after the first `count` tokens. Rows that draw nothing have zeros.
        """
        size = self.config.vocab_size
        numbers = np.zeros((room or 1, len(rows.sequences), size), np.float32)
        for row, sequence in enumerate(rows.sequences):
            if sequence is None or not sequence.left or sequence.request.sampling.is_greedy:
                continue
            seed = sequence.request.seed
            assert seed is not None, "filled in by Request"
            for i in range(count):
                numbers[i, row] = sampler.uniforms(seed, sequence.sampled + i, size)
        return self.ops.asarray(numbers if room is not None else numbers[0])

    def scores(self, tokens: Tokens[int]) -> np.ndarray:
        """Compute the scores of the next token after each token: (T, V) float32."""
        rows = np.empty((len(tokens), self.config.vocab_size), np.float32)
        for chunk, scores in self._run_chunks(self.steps.score(), tokens):
            rows[chunk.start : chunk.end] = self.ops.to_numpy(scores)[0, : chunk.end - chunk.start]
        return rows

    def logprobs(self, tokens: Tokens[int], pause: Callable[[], None] | None = None) -> Logprobs:
        """Compute log probabilities after each token: of the next token, and of the likeliest ones.

        The scores of at most 64 tokens are in memory at a time.

        Args:
            pause: Called after each part of the tokens.
        Returns:
            The result of `logprobs.logprobs` on the host, with T rows. The last row's `chosen` is
            garbage, since no token follows.
        """
        parts = []
        following = [*tokens[1:], 0]
        for chunk, found in self._run_chunks(self.steps.score_tokens(), tokens, following):
            count = chunk.end - chunk.start
            parts.append({name: self.ops.to_numpy(a)[0, :count] for name, a in found.items()})
            if pause is not None:
                pause()
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run_chunks(
        self, function: Function, tokens: Tokens[int], following: Tokens[int] = ()
    ) -> Iterator[tuple[Chunk, Any]]:
        """Run tokens in small chunks with an empty cache, and yield the result of each chunk.

        Args:
            function: A compiled function that returns the cache and a result.
            following: The token after each token, if the function takes these too.
        """
        is_long = self.tables.is_long(len(tokens))
        cache = self.new_cache(len(tokens), is_long)
        for chunk in chunks(tokens, LOGITS_CHUNKS, is_padded=self._is_padded):
            self.make_room(cache, np.array([chunk.start], np.int32), chunk.size)
            inputs = [chunk.tokens, chunk.positions]
            if following:
                after = np.zeros((1, chunk.size), np.int32)
                after[0, : chunk.end - chunk.start] = following[chunk.start : chunk.end]
                inputs.append(after)
            cache.layers, result = self.steps.run(
                function,
                cache,
                self.tables.until(chunk.start + chunk.size, is_long),
                tuple(map(self.ops.asarray, inputs)),
            )
            yield chunk, result

    # ---- caches ----------------------------------------------------------------------------

    @property
    def _is_padded(self) -> bool:
        """Return whether chunks are padded to few sizes. They are if every step is compiled."""
        ops = self.ops.capabilities
        return ops.compiles and ops.compiled_tokens is None

    @cached_property
    def slot_bytes(self) -> int:
        """Return the number of bytes of a slot in all layers."""
        c = self.config
        layer = self.ops.new_cache(1, c.num_key_value_heads, 1, c.head_dim)
        return c.num_hidden_layers * bytes_of(layer)

    def positions_in(self, size_bytes: int) -> int | None:
        """Return how many positions a cache of this size holds; None means any number."""
        most = size_bytes // self.slot_bytes
        window = self.config.sliding_window
        if window is not None and self.capacity_for(2**30) <= most:
            return None
        capacity = MIN_CAPACITY
        while 2 * capacity <= most:
            capacity *= 2
        return capacity if capacity <= most else 0

    def new_cache(self, positions: int, is_long: bool = False) -> Cache:
        """Make an empty cache of one row with slots for this many positions."""
        c, capacity = self.config, self.capacity_for(positions)
        layers = [
            self.ops.new_cache(1, c.num_key_value_heads, capacity, c.head_dim)
            for _ in range(c.num_hidden_layers)
        ]
        start = np.array([self.tables.start(is_long)], np.int32)
        return Cache(self.ops, layers, capacity, start, np.zeros(1, np.int32))

    def capacity_for(self, positions: int) -> int:
        """Return a capacity for this many positions, limited to what the window needs."""
        window, capacity = self.config.sliding_window, capacity_for(positions)
        if window is None:
            return capacity
        return min(capacity, capacity_of_window(window, self.ops.capabilities.prompt_chunks[-1]))

    def make_room(self, cache: Cache, starts: np.ndarray, count: int) -> None:
        """Ensure that each row has slots for `count` tokens from its position in `starts` on."""
        if not cache.lacks(starts, count):
            return
        self._grow(cache, starts, self.capacity_for(int((starts + count - cache.first).max())))
        if cache.lacks(starts, count):
            assert self.config.sliding_window is not None, "a cache without a window grows"
            counts = cache.unseen(starts, count, self.config.sliding_window)
            cache.freed(self.steps.shift(cache.layers, counts), counts)

    def _grow(self, cache: Cache, ends: np.ndarray, capacity: int) -> None:
        """Grow a cache to this capacity, if it is smaller.

        Args:
            ends: The position after the last token of each row, (B,) int32.
        """
        if capacity > cache.capacity:
            grown = self.copy(cache, range(len(ends)), ends, capacity)
            cache.layers, cache.capacity = grown.layers, capacity

    def copy(
        self, cache: Cache, indices: Tokens[int], ends: np.ndarray, capacity: int | None = None
    ) -> Cache:
        """Return a cache that has copies of the rows with these indices, in this order.

        Args:
            ends: The position after the last token of each of these rows that is to be copied,
                (N,) int32.
            capacity: The number of slots of the new cache; None means as many as before.
        """
        chosen, capacity = np.array(indices, np.int32), capacity or cache.capacity
        first, rope_start = cache.first[chosen], cache.rope_start[chosen]
        slots = np.clip(ends - first, 0, min(capacity, cache.capacity)).astype(np.int32)
        args = self.ops.asarray(chosen), self.ops.asarray(slots), capacity
        layers = [self.ops.copy_rows(layer, *args) for layer in cache.layers]
        return Cache(self.ops, layers, capacity, rope_start, first)

    # ---- rows ------------------------------------------------------------------------------

    def rearrange(self, rows: Rows, indices: Tokens[int], size: int) -> None:
        """Give a cache and states the rows with these indices, in this order, and unused rows.

        The other arrays of `rows` no longer fit; `Rows.of` makes new ones.

        Args:
            size: The number of rows, the unused ones included.
        """
        ends = rows.positions(0)[indices]
        unused = size - len(indices)
        indices, ends = [*indices, *[indices[0]] * unused], np.pad(ends, (0, unused))
        rows.cache = self.copy(rows.cache, indices, ends)
        if rows.states:
            rows.states = self.steps.take_states(rows.states, np.array(indices, np.int32))

    def insert(self, rows: Rows, index: int, new: Rows) -> None:
        """Replace a row of a cache and of states by the only row of `new`."""
        self._grow(rows.cache, rows.positions(0), new.cache.capacity)
        end = int(new.positions(0)[0])
        layers = self.steps.insert(
            rows.cache.layers, new.cache.layers, index, end - int(new.cache.first[0])
        )
        rows.cache = rows.cache.with_row(layers, index, new.cache)
        if rows.states:
            rows.states = self.steps.put_states(rows.states, new.states, index)
