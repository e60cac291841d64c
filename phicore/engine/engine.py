"""Time: filling the cache with a prompt, then one token after another.

There is one compiled function, `step`: the graph, the head and the sampler on T new tokens. With
the prompt's chunks it is prefill, with T = 1 it is decode. Where a call costs much, several decode
steps are compiled as a loop. Chunks come in few sizes and the cache in few capacities, so that it
is compiled a few times and not once per prompt length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np

from phicore.backend import Array, Backend, LayerCache, Params
from phicore.engine.sequence import SequenceCache, TokenSequence
from phicore.engine.shapes import LOGITS_CHUNKS, capacity_for, capacity_of_window, chunks
from phicore.engine.timings import Timings
from phicore.errors import ArgumentError, ContextError, PhicoreError
from phicore.gguf.reader import GGUFFile
from phicore.network import graph, sampler
from phicore.network.architectures import Architecture, architecture_of
from phicore.network.config import Phi3Config
from phicore.network.processors import LogitsProcessor, check_same
from phicore.network.rope import RopeFactors, is_long, rope_tables
from phicore.network.sampler import Sampling
from phicore.network.tensors import vocab_size
from phicore.network.weights import load_params
from phicore.progress import Progress

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

    @classmethod
    def load(
        cls,
        ops: Backend,
        file: GGUFFile,
        architecture: Architecture | None = None,
        *,
        context: int | None = None,
        progress: Progress = lambda *_: None,
    ) -> Self:
        """The engine of a file's model.

        Args:
            architecture: What reads the file; None takes the built-in one of its name.
            context: How many positions at most; None takes all that the model knows.
        Raises:
            GGUFError: If the file is not understood.
            ArgumentError: If the backend cannot hold such a model.
        """
        architecture = architecture or architecture_of(file.metadata)
        config = architecture.config(file.metadata)
        share = config.share(ops.devices)  # what can be wrong, before a long load
        ops.new_cache(1, 1, 1, config.head_dim)  # a type may not have room for such heads
        rope_factors = architecture.rope_factors(config, file)
        return cls(
            ops,
            share,
            load_params(ops, architecture, config, file, progress),
            vocab_size=vocab_size(file),
            context=config.max_position_embeddings if context is None else context,
            progress=progress,
            rope_factors=rope_factors,
        )

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
            check_same(f"{kind.__name__}.apply", {"scores": logits}, {"scores": changed})
            logits = changed
        token = xp.expand_dims(sampler.sample(ops, logits, penalty, draw), axis=1)
        position = xp.take_along_axis(positions, index, axis=1) + 1
        recent = xp.concat([penalty["recent"][:, 1:], token], axis=1)
        following = [k.advance(ops, s, token) for k, s in zip(kinds, states, strict=True)]
        for kind, old, new in zip(kinds, states, following, strict=True):
            check_same(f"{kind.__name__}.advance", old, new)
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
        sequence = TokenSequence(
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
            PhicoreError: If a score is not a finite number.
        """
        self._check_fits(tokens, 0)
        cache = SequenceCache(self, len(tokens), len(tokens))
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
        if not np.isfinite(rows).all():
            raise PhicoreError(_NOT_FINITE)
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

    def call(self, fn: Any, cache: SequenceCache, args: tuple[Any, ...], timings: Timings) -> Any:
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


def _shapes(arg: Any) -> Any:
    """What a compiler specializes on: shapes, and which parts of the sampler there are."""
    if isinstance(arg, list):
        return tuple(map(_shapes, arg))
    if isinstance(arg, dict):
        return tuple((name, tuple(value.shape)) for name, value in sorted(arg.items()))
    return None if arg is None else tuple(arg.shape)
