"""Time: filling the cache with a prompt, then one token after another.

There is one compiled function, `step`: the graph, the head and the sampler on T new tokens. With
the prompt's chunks it is prefill, with T = 1 it is decode. Chunks come in few sizes and the cache
in few capacities, so that it is compiled a few times and not once per prompt length.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phicore import graph, sampler
from phicore.config import Phi3Config
from phicore.errors import ArgumentError, ContextError
from phicore.loader import Progress
from phicore.protocol import Array, Backend, LayerCache, Params
from phicore.sampler import Sampling

CHUNKS = (1, 16, 64, 256)
LOGITS_CHUNK = 64
MIN_CAPACITY = 256
MIN_RECENT = 64


@dataclass
class Timings:
    """Where the time of a generation went, and how much was done."""

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    """From the start to the first token, without compiling."""
    generated_tokens: int = 0
    decode_s: float = 0.0
    """From the first token to the last, without compiling."""
    compile_s: float = 0.0
    first_token_s: float = 0.0
    """From the start to the first token, compiling included."""

    def count_token(self, since_start_s: float) -> None:
        """A token is there; what was compiled so far is in `compile_s` already."""
        if self.generated_tokens == 0:
            self.first_token_s = since_start_s
            self.prompt_s = since_start_s - self.compile_s
        self.generated_tokens += 1
        self.decode_s = since_start_s - self.compile_s - self.prompt_s

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prompt_s if self.prompt_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Of the tokens after the first, whose time is the prompt's."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


class Engine:
    """Runs one model on one backend. Holds no state of a sequence: several may run at a time."""

    def __init__(
        self, ops: Backend, config: Phi3Config, params: Params, context: int, progress: Progress
    ) -> None:
        self._ops = ops
        self._config = config
        self._params = params
        self._context = context
        self._progress = progress
        self._called: set[Any] = set()
        self._step = ops.compile(self._step_fn, donate=(1,))
        self._score = ops.compile(self._score_fn, donate=(1,))

    # ---- what is compiled ------------------------------------------------------------------

    def _step_fn(
        self,
        params: Params,
        cache: list[LayerCache],
        tokens: Array,
        positions: Array,
        last: Array,
        penalty: dict[str, Array] | None,
        draw: dict[str, Array] | None,
    ) -> tuple[list[LayerCache], Array, Array, Array | None]:
        """Run tokens (B, T), and sample what follows the one at index `last` (B,) of each row.

        Returns:
            The cache; the tokens and positions of the next step, (B, 1); its `recent`.
        """
        ops, xp = self._ops, self._ops.xp
        hidden, cache = graph.forward(ops, self._config, params, tokens, positions, cache)
        index = last[:, None]  # (B, 1)
        shape = (hidden.shape[0], 1, hidden.shape[2])
        hidden = xp.take_along_axis(hidden, xp.broadcast_to(index[:, :, None], shape), axis=1)
        logits = graph.logits(ops, params, hidden[:, 0, :])
        token = xp.expand_dims(sampler.sample(ops, logits, penalty, draw), axis=1)
        position = xp.take_along_axis(positions, index, axis=1) + 1
        recent = None
        if penalty is not None:
            recent = xp.concat([penalty["recent"][:, 1:], token], axis=1)
        return cache, token, position, recent

    def _score_fn(
        self, params: Params, cache: list[LayerCache], tokens: Array, positions: Array
    ) -> tuple[list[LayerCache], Array]:
        """The cache, and the logits (B, T, V) of all tokens."""
        hidden, cache = graph.forward(self._ops, self._config, params, tokens, positions, cache)
        return cache, graph.logits(self._ops, params, hidden)

    # ---- what the model calls --------------------------------------------------------------

    def generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        limit: int,
        seed: int,
        timings: Timings,
    ) -> Iterator[int]:
        """Yield `limit` tokens that follow the prompt, at most `room_after` it."""
        started = time.perf_counter()
        timings.prompt_tokens = len(prompt)
        penalty, draw = self._sampling_inputs(prompt, sampling, limit)
        cache = self._new_cache(len(prompt) + 1)
        for tokens, positions, last in _chunks(prompt, CHUNKS):
            if draw is not None:
                draw["uniform"] = self._floats(sampler.uniform(seed, 0))
            cache = self._grown(cache, int(positions[0, -1]) + 1)
            args = (*map(self._ops.asarray, (tokens, positions, last)), penalty, draw)
            cache, token, position, recent = self._timed(self._step, cache, args, timings)
            self._progress("prompt", min(int(positions[0, -1]) + 1, len(prompt)), len(prompt))
        only = self._ops.asarray(np.zeros(1, np.int32))

        def read(token: Array) -> int:
            value = int(self._ops.to_numpy(token)[0, 0])
            timings.count_token(time.perf_counter() - started)
            return value

        for index in range(limit):
            this = token
            # One step ahead where the library works in the background; but the first token does
            # not wait for the decode step to be compiled.
            ahead = self._ops.asynchronous and index > 0
            if not ahead:
                yield read(this)
            if index + 1 < limit:
                cache = self._grown(cache, len(prompt) + index + 1)
                if penalty is not None:
                    penalty = {**penalty, "recent": recent}
                if draw is not None:
                    draw = {**draw, "uniform": self._floats(sampler.uniform(seed, index + 1))}
                args = (token, position, only, penalty, draw)
                cache, token, position, recent = self._timed(self._step, cache, args, timings)
            if ahead:
                yield read(this)

    def room_after(self, prompt: Sequence[int]) -> int:
        """How many tokens can follow a prompt; at least one.

        Raises:
            ContextError: If it leaves no room.
            ArgumentError: If it has no tokens.
        """
        self._check_fits(prompt, 1)
        return self._context - len(prompt)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Scores of the next token after each token: (T, V) float32.

        Raises:
            ContextError: If the tokens are more than the context.
        """
        self._check_fits(tokens, 0)
        cache = self._new_cache(len(tokens))
        rows = []
        for ids, positions, last in _chunks(tokens, (1, LOGITS_CHUNK)):
            cache = self._grown(cache, int(positions[0, -1]) + 1)
            args = (self._ops.asarray(ids), self._ops.asarray(positions))
            cache, logits = self._timed(self._score, cache, args, Timings())
            rows.append(self._ops.to_numpy(logits)[0, : last[0] + 1])
        return np.concatenate(rows)

    # ---- helpers ---------------------------------------------------------------------------

    def _check_fits(self, prompt: Sequence[int], answer: int) -> None:
        if not len(prompt):
            raise ArgumentError("prompt: expected at least one token, got none")
        if len(prompt) + answer > self._context:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and the context holds {self._context}, "
                "the answer included; shorten the prompt or raise the context"
            )

    def _new_cache(self, positions: int) -> list[LayerCache]:
        c = self._config
        capacity = capacity_for(positions)
        return [
            self._ops.new_cache(1, c.num_key_value_heads, capacity, c.head_dim)
            for _ in range(c.num_hidden_layers)
        ]

    def _grown(self, cache: list[LayerCache], positions: int) -> list[LayerCache]:
        """The cache, with room for this many positions."""
        if _capacity_of(cache) >= positions:
            return cache
        capacity = capacity_for(positions)
        return [self._ops.grow_cache(layer, capacity) for layer in cache]

    def _sampling_inputs(
        self, prompt: Sequence[int], sampling: Sampling, limit: int
    ) -> tuple[dict[str, Array] | None, dict[str, Array] | None]:
        """The sampler's arguments at the first step; later only `recent` and `uniform` change."""
        penalty, draw = None, None
        if sampling.has_penalty:
            last_n = sampling.repeat_last_n
            if last_n < 0 or last_n > self._context:
                last_n = len(prompt) + limit
            size = max(MIN_RECENT, _power_of_two(last_n))
            recent = np.full((1, size), -1, np.int32)
            known = prompt[-size:]
            recent[0, size - len(known) :] = known
            penalty = {
                "recent": self._ops.asarray(recent),
                "last_n": self._ops.asarray(np.array([last_n], np.int32)),
                "repeat_penalty": self._floats(sampling.repeat_penalty),
            }
        if not sampling.is_greedy:
            draw = {"temperature": self._floats(sampling.temperature)}
            if sampling.has_filter:
                draw["top_k"] = self._ops.asarray(np.array([sampling.top_k], np.int32))
                draw["top_p"] = self._floats(sampling.top_p)
                draw["min_p"] = self._floats(sampling.min_p)
        return penalty, draw

    def _floats(self, value: float) -> Array:
        return self._ops.asarray(np.array([value], np.float32))

    def _timed(
        self, fn: Any, cache: list[LayerCache], args: tuple[Any, ...], timings: Timings
    ) -> Any:
        """Call a compiled function; the first call with new shapes counts as compiling."""
        if not self._ops.compiles:
            return fn(self._params, cache, *args)
        key = (fn is self._step, args[0].shape, _capacity_of(cache), _structure(args[3:]))
        if key in self._called:
            return fn(self._params, cache, *args)
        self._progress("compiling", 0, 1)
        started = time.perf_counter()
        result = fn(self._params, cache, *args)
        timings.compile_s += time.perf_counter() - started
        self._called.add(key)
        self._progress("compiling", 1, 1)
        return result


def capacity_for(positions: int) -> int:
    """Room for this many positions: 256 times a power of two, for few recompilations.

    Since chunks of a prompt start at multiples of the largest chunk size, it has room for the
    padding of the last one too.
    """
    return MIN_CAPACITY * _power_of_two(-(-positions // MIN_CAPACITY))


def _capacity_of(cache: list[LayerCache]) -> int:
    return int(next(iter(cache[0].values())).shape[2])


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _structure(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Which sampler is compiled: the names and shapes of its inputs."""
    return tuple(
        None if a is None else tuple((name, tuple(v.shape)) for name, v in sorted(a.items()))
        for a in args
    )


def _chunks(
    tokens: Sequence[int], sizes: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Cut a prompt into pieces of the given sizes, the last one padded.

    Yields:
        Tokens (1, T) and positions (1, T) int32, and the index (1,) of the last real token.
    """
    start = 0
    while start < len(tokens):
        left = len(tokens) - start
        size = next((s for s in sizes if s >= left), sizes[-1])
        count = min(size, left)
        chunk = np.zeros((1, size), np.int32)
        chunk[0, :count] = tokens[start : start + count]
        positions = np.arange(start, start + size, dtype=np.int32)[None]
        yield chunk, positions, np.array([count - 1], np.int32)
        start += count
