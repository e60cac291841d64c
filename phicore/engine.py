"""Time: filling the cache with a prompt, then one token after another.

There is one compiled function, `step`: the graph, the head and the sampler on T new tokens. With
the prompt's chunks it is prefill, with T = 1 it is decode. Where a call costs much, several decode
steps are compiled as a loop. Chunks come in few sizes and the cache
in few capacities, so that it is compiled a few times and not once per prompt length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from phicore import graph, sampler
from phicore.config import Phi3Config
from phicore.errors import ArgumentError, ContextError, PhicoreError
from phicore.loader import Progress
from phicore.logits import LogitsProcessor, needs_tokens
from phicore.protocol import Array, Backend, LayerCache, Params
from phicore.rope import RopeFactors, is_long, rope_tables
from phicore.sampler import Sampling
from phicore.shapes import (
    LOGITS_CHUNKS,
    capacity_for,
    capacity_of_window,
    chunks,
    power_of_two,
)
from phicore.timings import Timings

MIN_RECENT = 64
EXPECTED_ANSWER = 512  # tokens that a new cache has room for at once, if so many are asked for

Rope = tuple[Array, Array]
Kinds = tuple[type[LogitsProcessor], ...]


class Engine:
    """Runs one model on one backend. Holds no state of a sequence: several may run at a time."""

    def __init__(
        self,
        ops: Backend,
        config: Phi3Config,
        params: Params,
        *,
        vocab_size: int,
        context: int,
        progress: Progress,
        rope_factors: RopeFactors | None = None,
    ) -> None:
        self.ops = ops
        self.vocab_size = vocab_size
        self.config = config
        self.params = params
        self.context = context
        self.progress = progress
        self._called: set[Any] = set()
        self._rope_factors = rope_factors
        self._rope_tables: dict[tuple[int, bool], Rope] = {}
        self._compiled: dict[tuple[Any, Kinds], Callable[..., Any]] = {}
        self._score = ops.compile(self.score_fn, donate=(1,))
        self._shift = ops.compile(self.shift_fn, donate=(0,))

    # ---- what is compiled ------------------------------------------------------------------

    def step_fn(
        self,
        kinds: Kinds,
        params: Params,
        cache: list[LayerCache],
        rope: Rope,
        tokens: Array,
        positions: Array,
        last: Array,
        penalty: dict[str, Array],
        draw: dict[str, Array] | None,
        states: list[Mapping[str, Array]],
    ) -> tuple[list[LayerCache], Array, Array, Array, list[Mapping[str, Array]]]:
        """Run tokens (B, T), and sample what follows the one at index `last` (B,) of each row.

        Args:
            kinds: The logits processors, which are compiled into it.
            states: Theirs.
        Returns:
            The cache; the tokens and positions of the next step, (B, 1); its `recent` and states.
        """
        ops, xp = self.ops, self.ops.xp
        hidden, cache = graph.forward(ops, self.config, params, rope, tokens, positions, cache)
        index = last[:, None]  # (B, 1)
        shape = (hidden.shape[0], 1, hidden.shape[2])
        hidden = xp.take_along_axis(hidden, xp.broadcast_to(index[:, :, None], shape), axis=1)
        logits = graph.logits(ops, params, hidden[:, 0, :])
        for kind, state in zip(kinds, states, strict=True):
            changed = kind.apply(ops, logits, state)
            _check_same(f"{kind.__name__}.apply", {"scores": logits}, {"scores": changed})
            logits = changed
        token = xp.expand_dims(sampler.sample(ops, logits, penalty, draw), axis=1)
        position = xp.take_along_axis(positions, index, axis=1) + 1
        recent = xp.concat([penalty["recent"][:, 1:], token], axis=1)
        following = [k.advance(ops, s, token) for k, s in zip(kinds, states, strict=True)]
        for kind, old, new in zip(kinds, states, following, strict=True):
            _check_same(f"{kind.__name__}.advance", old, new)
        return cache, token, position, recent, following

    def steps_fn(
        self,
        kinds: Kinds,
        params: Params,
        cache: list[LayerCache],
        rope: Rope,
        token: Array,
        position: Array,
        penalty: dict[str, Array],
        draw: dict[str, Array] | None,
        states: list[Mapping[str, Array]],
        count: Array,
        ends: Array,
    ) -> tuple[list[LayerCache], Array, Array, Array, list[Mapping[str, Array]], Array]:
        """Decode steps one after the other, N at most, until every row has ended.

        Args:
            token, position: (B, 1), of the first.
            draw: With numbers for each of them, `uniforms` (N, B, V).
            count: (1,) int32, how many are wanted.
            ends: (any,) int32, the tokens that end a row; so does one that is no number.
        Returns:
            What `step_fn` does, of the last one; and what each sampled, (B, N).
        """
        ops, xp = self.ops, self.ops.xp
        only = position[:, 0] * 0
        slots = xp.arange(ops.steps, dtype=xp.int32)[None, :]

        def goes_on(state: dict[str, Any]) -> Array:
            token = state["token"]
            has_ended = (token == ends[None, :]) | (token < 0)  # (B, any)
            rows_left = 1 - xp.max(xp.astype(has_ended, xp.int32), axis=1)
            return (state["index"] < count) & (xp.max(rows_left, axis=0, keepdims=True) > 0)

        def step(state: dict[str, Any]) -> dict[str, Any]:
            index, numbers = state["index"], draw
            if draw is not None:
                numbers = {**draw, "uniforms": xp.take(draw["uniforms"], index, axis=0)[0, :, :]}
            cache, token, position, recent, states = self.step_fn(
                kinds,
                params,
                state["cache"],
                rope,
                state["token"],
                state["position"],
                only,
                {**penalty, "recent": state["recent"]},
                numbers,
                state["states"],
            )
            return {
                "cache": cache,
                "token": token,
                "position": position,
                "recent": recent,
                "states": states,
                "index": index + 1,
                "tokens": xp.where(slots == index[:, None], token, state["tokens"]),
            }

        first = {
            "cache": cache,
            "token": token,
            "position": position,
            "recent": penalty["recent"],
            "states": states,
            "index": count * 0,
            "tokens": xp.broadcast_to(token, (token.shape[0], ops.steps)),
        }
        s = ops.while_loop(goes_on, step, first)
        names = ("cache", "token", "position", "recent", "states", "tokens")
        return tuple(s[name] for name in names)

    def score_fn(
        self, params: Params, cache: list[LayerCache], rope: Rope, tokens: Array, positions: Array
    ) -> tuple[list[LayerCache], Array]:
        """The cache, and the logits (B, T, V) of all tokens."""
        ops = self.ops
        hidden, cache = graph.forward(ops, self.config, params, rope, tokens, positions, cache)
        return cache, graph.logits(ops, params, hidden)

    def shift_fn(
        self, cache: list[LayerCache], position: Array, count: Array
    ) -> tuple[list[LayerCache], Array]:
        """Forget the first `count` (B,) positions; `position` (B, 1) is counted without them."""
        return [self.ops.shift_cache(layer, count) for layer in cache], position - count[:, None]

    # ---- what the model calls --------------------------------------------------------------

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        limit: int,
        seed: int,
        timings: Timings,
        processors: Sequence[LogitsProcessor] = (),
        ends: Collection[int] = (),
    ) -> Iterator[int]:
        """Yield `limit` tokens that follow the prompt, at most `room_after` it, or up to an end."""
        started = time.perf_counter()
        sequence = _Sequence(
            self, prompt, sampling, processors, limit=limit, seed=seed, timings=timings, ends=ends
        )
        timings.prompt_tokens = len(prompt)
        sequence.prefill(prompt)
        done = 0
        while True:
            tokens, count = sequence.sampled, sequence.count
            left = limit - done - count
            # One call ahead where the library works in the background; but the first token does
            # not wait for the decode step to be compiled.
            is_ahead = self.ops.asynchronous and done > 0 and not sequence.needs_tokens
            if is_ahead and left:
                sequence.decode(left)
            for value in self.read(tokens)[:count]:
                if value < 0:
                    raise PhicoreError(_NO_TOKEN if processors else _NOT_FINITE)
                sequence.tell(value)
                timings.count_token(time.perf_counter() - started)
                if done == 0:
                    self.progress("prompt", len(prompt), len(prompt))
                done += 1
                yield value
                if value in ends:
                    return
            if not left:
                return
            if not is_ahead:
                sequence.decode(left)

    def room_after(self, prompt: Sequence[int]) -> int:
        """How many tokens can follow a prompt; at least one.

        Raises:
            ContextError: If it leaves no room.
            ArgumentError: If it has no tokens.
        """
        self._check_fits(prompt, 1)
        return self.context - len(prompt)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Scores of the next token after each token: (T, V) float32.

        Raises:
            ContextError: If the tokens are more than the context.
        """
        self._check_fits(tokens, 0)
        cache = _Cache(self, len(tokens), len(tokens))
        rows: np.ndarray | None = None
        for ids, positions, last in chunks(tokens, LOGITS_CHUNKS, is_padded=self.is_padded):
            cache.make_room(positions[0, 0], ids.shape[1])
            args = (self.ops.asarray(ids), self.ops.asarray(positions - cache.first))
            cache.layers, logits = self.call(self._score, cache, args, Timings())
            found = self.ops.to_numpy(logits)[0, : last[0] + 1]
            if rows is None:
                rows = np.empty((len(tokens), found.shape[1]), np.float32)
            rows[positions[0, : last[0] + 1]] = found
        assert rows is not None
        return rows

    # ---- helpers ---------------------------------------------------------------------------

    def _check_fits(self, prompt: Sequence[int], answer: int) -> None:
        if not len(prompt):
            raise ArgumentError("prompt: expected at least one token, got none")
        if len(prompt) + answer > self.context:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.context}, "
                "the answer included; shorten the prompt or raise the context"
            )

    def read(self, tokens: Array) -> list[int]:
        """Those of a call, -1 where it found no finite scores to choose by; waits for it."""
        return [int(token) for token in self.ops.to_numpy(tokens)[0]]

    def step(self, kinds: Kinds) -> Callable[..., Any]:
        """The compiled `step_fn` with these logits processors."""
        return self._compile(self.step_fn, kinds)

    def steps(self, kinds: Kinds) -> Callable[..., Any]:
        """The compiled `steps_fn`."""
        return self._compile(self.steps_fn, kinds)

    def _compile(self, fn: Callable[..., Any], kinds: Kinds) -> Callable[..., Any]:
        key = (fn.__name__, kinds)
        if key not in self._compiled:
            self._compiled[key] = self.ops.compile(partial(fn, kinds), donate=(1,))
        return self._compiled[key]

    def capacity_for(self, positions: int) -> int:
        """Slots of a cache for so many positions: no more than the window needs."""
        window = self.config.sliding_window
        capacity = capacity_for(positions)
        if window is None:
            return capacity
        return min(capacity, capacity_of_window(window, self.ops.prompt_chunks[-1]))

    def new_cache(self, capacity: int) -> list[LayerCache]:
        c = self.config
        return [
            self.ops.new_cache(1, c.num_key_value_heads, capacity, c.head_dim)
            for _ in range(c.num_hidden_layers)
        ]

    def shifted(
        self, layers: list[LayerCache], position: Array, count: int
    ) -> tuple[list[LayerCache], Array]:
        """See `shift_fn`."""
        return self._shift(layers, position, self.ops.asarray(np.array([count], np.int32)))

    @property
    def is_padded(self) -> bool:
        """Whether chunks are to have few sizes, since each is compiled."""
        return self.ops.compiles and self.ops.compiled_tokens is None

    @property
    def window(self) -> int | None:
        return self.config.sliding_window

    def call(self, fn: Any, cache: _Cache, args: tuple[Any, ...], timings: Timings) -> Any:
        """Call a compiled function; the first call with new shapes counts as compiling."""
        args = (self.params, cache.layers, cache.rope, *args)
        key = (fn, cache.capacity, *map(_shapes, args[3:]))
        most, tokens = self.ops.compiled_tokens, args[3]
        is_compiled = self.ops.compiles and (most is None or tokens.shape[1] <= most)
        if not is_compiled or key in self._called:
            return fn(*args)
        self.progress("compiling", 0, 1)
        started = time.perf_counter()
        result = fn(*args)
        timings.compile_s += time.perf_counter() - started
        self._called.add(key)
        self.progress("compiling", 1, 1)
        return result

    def is_long(self, length: int) -> bool:
        """Whether a sequence of this length, prompt and answer, rotates by the long factors."""
        return self._rope_factors is not None and is_long(self.config, length)

    def rope(self, first: int, count: int, is_long: bool) -> Rope:
        """The rotary tables of `count` positions from `first` on."""
        if first:  # not kept: a sequence gets there once
            return self._rope(first, count, is_long)
        key = (count, is_long)
        if key not in self._rope_tables:
            self._rope_tables[key] = self._rope(first, count, is_long)
        return self._rope_tables[key]

    def _rope(self, first: int, count: int, is_long: bool) -> Rope:
        factors, scale = None, 1.0
        if self._rope_factors is not None:
            factors = self._rope_factors.long if is_long else self._rope_factors.short
            scale = self._rope_factors.scale
        positions = np.arange(first, first + count)
        cos, sin = rope_tables(self.config, positions, factors, scale)
        return self.ops.asarray(cos), self.ops.asarray(sin)


_NOT_FINITE = (
    "the model's scores are not finite numbers: the file is damaged, or its numbers are too large "
    "for this backend"
)
_NO_TOKEN = (
    "no token can be chosen: the logits processors forbid all, or scores are not finite numbers"
)


class _Cache:
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


class _Sequence:
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
        self._cache = _Cache(engine, len(prompt) + min(limit, EXPECTED_ANSWER), planned)
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
                _check_same(f"{type(processor).__name__}.update", old, new)
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


def _check_same(what: str, old: Mapping[str, Array], new: Mapping[str, Array]) -> None:
    """Refuse arrays of other names, shapes or dtypes than those they replace."""
    kinds = [{name: (tuple(a.shape), a.dtype) for name, a in d.items()} for d in (old, new)]
    for name in old.keys() | new.keys():
        expected, found = (kind.get(name) for kind in kinds)
        if expected != found:
            said = [k and f"{k[1]} {list(k[0])}" for k in (expected, found)]
            raise PhicoreError(f"{what}: {name}: expected {said[0]}, got {said[1]}")


def _shapes(arg: Any) -> Any:
    """What a compiler specializes on: shapes, and which parts of the sampler there are."""
    if isinstance(arg, list):
        return tuple(map(_shapes, arg))
    if isinstance(arg, dict):
        return tuple((name, tuple(value.shape)) for name, value in sorted(arg.items()))
    return None if arg is None else tuple(arg.shape)
