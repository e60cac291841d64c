"""The steps that are compiled: pure functions of B rows, without knowledge of sequences or time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phicore.backend import Array, Backend, LayerCache, Params
from phicore.network import graph, sampler
from phicore.network.config import Phi3Config
from phicore.network.logprobs import MOST, logprobs
from phicore.network.processors import Kinds, check_same
from phicore.network.rope import Tables, rope_at

States = list[Mapping[str, Array]]
"""The states of logits processors, arrays (B, ...)."""
Place = dict[str, Array]
"""Two arrays (B,) int32: `first`, the position in slot 0 of each row, and `rope_start`, the row of
the rotary tables for position 0."""
Logprobs = dict[str, Array]
"""The result of `logprobs.logprobs` for some tokens, with their axis: arrays (B, N, ...). Empty if
nobody asked."""
ENDED = -2
"""An end token that no vocabulary has. A row with it has ended from the beginning."""


class Steps:
    """The steps of a network on a backend."""

    def __init__(self, ops: Backend, config: Phi3Config) -> None:
        self.ops = ops
        self.config = config

    def hidden(
        self,
        params: Params,
        cache: list[LayerCache],
        tables: Tables,
        place: Place,
        tokens: Array,
        positions: Array,
    ) -> tuple[Array, list[LayerCache]]:
        """Run tokens (B, T) at positions (B, T) through the network; see `graph.forward`."""
        rope = rope_at(self.ops.xp, tables, positions + place["rope_start"][:, None])
        slots = positions - place["first"][:, None]
        return graph.forward(self.ops, self.config, params, rope, tokens, slots, cache)

    def step(
        self,
        kinds: Kinds,
        params: Params,
        cache: list[LayerCache],
        tables: Tables,
        place: Place,
        tokens: Array,
        positions: Array,
        last: Array,
        penalty: dict[str, Array],
        draw: dict[str, Array] | None,
        states: States,
        *,
        has_logprobs: bool = False,
    ) -> tuple[list[LayerCache], Array, Array, Array, States, Logprobs]:
        """Run tokens, and sample one token for each row: `logits`, then `pick`.

        This is prefill with a chunk of a prompt, and decode with one token per row.

        Args:
            last: The index of the token in each row that the sampled token follows, (B,) int32.
        Returns:
            The cache; the sampled token and its position, (B, 1) int32; the `recent` tokens for the
            next step's penalty; the next step's states; and the log probabilities.
        """
        cache, logits = self.logits(params, cache, tables, place, tokens, positions, last)
        token, *others = self.pick(kinds, logits, penalty, draw, states, has_logprobs=has_logprobs)
        position = self.ops.xp.take_along_axis(positions, last[:, None], axis=1) + 1
        recent, following, found = others
        return cache, token, position, recent, following, found

    def logits(
        self,
        params: Params,
        cache: list[LayerCache],
        tables: Tables,
        place: Place,
        tokens: Array,
        positions: Array,
        last: Array,
    ) -> tuple[list[LayerCache], Array]:
        """Run tokens; return the cache and the logits of what follows one of them in each row.

        Args:
            tokens, positions: The tokens and their positions, (B, T) int32.
            last: The index of that token in each row, (B,) int32.
        Returns:
            The cache, and the logits (B, V) float32.
        """
        xp = self.ops.xp
        hidden, cache = self.hidden(params, cache, tables, place, tokens, positions)
        index = last[:, None]  # (B, 1)
        shape = (hidden.shape[0], 1, hidden.shape[2])
        hidden = xp.take_along_axis(hidden, xp.broadcast_to(index[:, :, None], shape), axis=1)
        return cache, graph.logits(self.ops, params, hidden[:, 0, :])

    def pick(
        self,
        kinds: Kinds,
        logits: Array,
        penalty: dict[str, Array],
        draw: dict[str, Array] | None,
        states: States,
        *,
        has_logprobs: bool = False,
    ) -> tuple[Array, Array, States, Logprobs]:
        """Sample one token for each row.

        Args:
            kinds: The classes of the logits processors.
            logits: The logits, (B, V).
            penalty, draw: Arguments of `sampler.sample`.
            states: The states of the logits processors.
            has_logprobs: Whether to compute log probabilities.
        Returns:
            The tokens, (B, 1) int32; the `recent` tokens for the next step's penalty; the next
            step's states; and the log probabilities.
        """
        ops, xp, raw = self.ops, self.ops.xp, logits
        for kind, state in zip(kinds, states, strict=True):
            changed = kind.apply(ops, logits, state)
            check_same(f"{kind.__name__}.apply", {"scores": logits}, {"scores": changed})
            logits = changed
        token = xp.expand_dims(sampler.sample(ops, logits, penalty, draw), axis=1)
        recent = xp.concat([penalty["recent"][:, 1:], token], axis=1)
        following = [k.advance(ops, s, token) for k, s in zip(kinds, states, strict=True)]
        for kind, old, new in zip(kinds, states, following, strict=True):
            check_same(f"{kind.__name__}.advance", old, new)
        found: Logprobs = {}
        if has_logprobs:
            found = logprobs(ops, raw, token[:, 0])
            found = {name: xp.expand_dims(array, axis=1) for name, array in found.items()}
        return token, recent, following, found

    def steps(
        self,
        kinds: Kinds,
        params: Params,
        cache: list[LayerCache],
        tables: Tables,
        place: Place,
        token: Array,
        position: Array,
        penalty: dict[str, Array],
        draw: dict[str, Array] | None,
        states: States,
        count: Array,
        ends: Array,
        *,
        has_logprobs: bool = False,
    ) -> tuple[list[LayerCache], Array, Array, Array, States, Logprobs, Array]:
        """Run decode steps one after the other, until `count` are done or every row has ended.

        Args:
            token, position: The token and the position of the first step, (B, 1) int32.
            draw: The argument of `step`, but with `uniforms` (N, B, V) for N steps, or with the
                `step` of the first.
            count: The number of requested steps, (1,) int32, at most N.
            ends: The tokens that end each row, (B, any) int32. A token below 0 also ends a row,
                and a row with `ENDED` has ended already.
            has_logprobs: Whether to compute log probabilities.
        Returns:
            The results of the last `step`, but with the log probabilities of all steps; and the
            tokens of all steps, (B, N) int32. What comes after the last step that ran is garbage.
        """
        ops, xp = self.ops, self.ops.xp
        most = ops.capabilities.steps
        only = position[:, 0] * 0
        places = xp.arange(most, dtype=xp.int32)[None, :]

        def put(old: Array, new: Array, index: Array) -> Array:
            """Replace what `old` (B, N, ...) has at a step by `new` (B, 1, ...)."""
            is_at = places == index[:, None]  # (1, N)
            return xp.where(is_at if len(old.shape) == 2 else is_at[:, :, None], new, old)

        def goes_on(state: dict[str, Any]) -> Array:
            token = state["token"]
            has_ended = (token == ends) | (token < 0) | (ends == ENDED)  # (B, any)
            rows_left = 1 - xp.max(xp.astype(has_ended, xp.int32), axis=1)
            return (state["index"] < count) & (xp.max(rows_left, axis=0, keepdims=True) > 0)

        def step(state: dict[str, Any]) -> dict[str, Any]:
            index, numbers = state["index"], draw
            if draw is not None and "uniforms" in draw:
                numbers = {**draw, "uniforms": xp.take(draw["uniforms"], index, axis=0)[0, :, :]}
            elif draw is not None:
                numbers = {**draw, "step": draw["step"] + xp.astype(index, xp.uint32)}
            cache, token, position, recent, states, found = self.step(
                kinds,
                params,
                state["cache"],
                tables,
                place,
                state["token"],
                state["position"],
                only,
                {**penalty, "recent": state["recent"]},
                numbers,
                state["states"],
                has_logprobs=has_logprobs,
            )
            return {
                "cache": cache,
                "token": token,
                "position": position,
                "recent": recent,
                "states": states,
                "index": index + 1,
                "tokens": put(state["tokens"], token, index),
                "logprobs": {n: put(state["logprobs"][n], new, index) for n, new in found.items()},
            }

        first = {
            "cache": cache,
            "token": token,
            "position": position,
            "recent": penalty["recent"],
            "states": states,
            "index": count * 0,
            "tokens": xp.broadcast_to(token, (token.shape[0], most)),
            "logprobs": self._no_logprobs(token.shape[0], most) if has_logprobs else {},
        }
        s = ops.while_loop(goes_on, step, first)
        names = ("cache", "token", "position", "recent", "states", "logprobs", "tokens")
        return tuple(s[name] for name in names)

    def guess(
        self,
        params: Params,
        cache: list[LayerCache],
        tables: Tables,
        place: Place,
        tokens: Array,
        positions: Array,
        last: Array,
        draw: dict[str, Array] | None,
    ) -> tuple[list[LayerCache], Array]:
        """Run tokens; sample one for each row as `step` does without penalties and processors.

        Args:
            last: The index of the token in each row that the sampled token follows, (B,) int32.
            draw: The argument of `sampler.sample`.
        Returns:
            The cache, and the tokens, (B, 1) int32; 0 stands for a token that cannot be chosen.
        """
        xp = self.ops.xp
        cache, logits = self.logits(params, cache, tables, place, tokens, positions, last)
        none = last[:, None] * 0 - 1  # no token was recent, so nothing is penalized
        penalty = {"recent": none, "last_n": last * 0, "repeat_penalty": logits[:, 0] * 0 + 1}
        token = sampler.sample(self.ops, logits, penalty, draw)
        return cache, xp.maximum(xp.expand_dims(token, axis=1), 0)

    def verify(
        self,
        kinds: Kinds,
        params: Params,
        cache: list[LayerCache],
        tables: Tables,
        place: Place,
        tokens: Array,
        positions: Array,
        penalty: dict[str, Array],
        draw: dict[str, Array] | None,
        states: States,
        ahead: list[States],
        is_ahead: list[States],
        *,
        has_logprobs: bool = False,
    ) -> tuple[list[LayerCache], Array, Array, States, Logprobs, Array]:
        """Run the last token of each row and a draft of what follows; sample after each of them.

        The sampled tokens of a row are its text up to the first that differs from the draft, this
        one included. What is returned for the next step is what comes after these.

        Args:
            tokens, positions: The tokens and their positions, (B, T) int32. A draft may end in
                padding of -1, which no sampled token equals.
            draw: The argument of `step`, but with `uniforms` (T, B, V), or with the `step` of the
                first token.
            ahead: The arrays of states that the host has computed, after each token of a draft: a
                list of T - 1 states, which need not have all arrays.
            is_ahead: For each of these arrays, in which rows it replaces the state's, bool (B, ...)
                with axes of 1.
            has_logprobs: Whether to compute log probabilities.
        Returns:
            The cache, whose slots after the text are overwritten before they are seen; the last
            token of the text, (B, 1) int32; the `recent` tokens; the states; the log probabilities
            of all sampled tokens; and all sampled tokens, (B, T) int32.
        """
        ops, xp = self.ops, self.ops.xp
        batch, count = tokens.shape
        known = xp.maximum(tokens, 0)
        hidden, cache = self.hidden(params, cache, tables, place, known, positions)
        hidden = xp.permute_dims(hidden, (1, 0, 2))  # below, the rows of each token: (T * B, ...)
        raw = logits = graph.logits(ops, params, xp.reshape(hidden, (-1, hidden.shape[2])))
        drafted = [known[:, i : i + 1] for i in range(1, count)]
        before = []
        for number, (kind, state) in enumerate(zip(kinds, states, strict=True)):
            all_states = [state]
            for token, told, is_told in zip(drafted, ahead, is_ahead, strict=True):
                following = dict(kind.advance(ops, all_states[-1], token))
                check_same(f"{kind.__name__}.advance", state, following)
                for name, array in told[number].items():
                    following[name] = xp.where(is_told[number][name], array, following[name])
                all_states.append(following)
            one = {name: xp.concat([s[name] for s in all_states], axis=0) for name in state}
            changed = kind.apply(ops, logits, one)
            check_same(f"{kind.__name__}.apply", {"scores": logits}, {"scores": changed})
            logits = changed
            before.append(one)
        recent, size = penalty["recent"], penalty["recent"].shape[1]
        window = xp.concat([recent, *drafted], axis=1)
        windows = xp.concat([window[:, i : i + size] for i in range(count)], axis=0)
        penalties = {name: xp.concat([a] * count, axis=0) for name, a in penalty.items()}
        sampled = sampler.sample(
            ops, logits, {**penalties, "recent": windows}, draw and self._draw_of_all(draw, count)
        )
        found: Logprobs = logprobs(ops, raw, sampled) if has_logprobs else {}
        after = [
            kind.advance(ops, state, xp.expand_dims(sampled, axis=1))
            for kind, state in zip(kinds, before, strict=True)
        ]
        new = xp.permute_dims(xp.reshape(sampled, (count, batch)), (1, 0))  # (B, T)
        is_right = new[:, :-1] == tokens[:, 1:]
        goes_on = is_right[:, :1]
        last = xp.astype(goes_on, xp.int32)  # the index of the last token of the text
        for i in range(1, count - 1):
            goes_on = goes_on & is_right[:, i : i + 1]
            last = last + xp.astype(goes_on, xp.int32)
        rows = last[:, 0] * batch + xp.arange(batch, dtype=xp.int32)
        ages = xp.arange(1, size + 1, dtype=xp.int32)[None, :]
        return (
            cache,
            xp.take_along_axis(new, last, axis=1),
            xp.take_along_axis(xp.concat([recent, new], axis=1), last + ages, axis=1),
            self.take(after, rows),
            {name: self._by_row(array, batch) for name, array in found.items()},
            new,
        )

    def _draw_of_all(self, draw: dict[str, Array], count: int) -> dict[str, Array]:
        """Return the argument `draw` of `sampler.sample` for `count` tokens of each row."""
        xp, one = self.ops.xp, dict(draw)
        of_tokens = {}
        if "uniforms" in draw:
            numbers = one.pop("uniforms")
            of_tokens["uniforms"] = xp.reshape(numbers, (-1, numbers.shape[2]))
        else:
            step = one.pop("step")
            of_tokens["step"] = xp.concat([step + i for i in range(count)], axis=0)
        return {**of_tokens, **{n: xp.concat([a] * count, axis=0) for n, a in one.items()}}

    def _by_row(self, array: Array, batch: int) -> Array:
        """Turn (T * B, ...) into (B, T, ...)."""
        rest = tuple(range(2, len(array.shape) + 1))
        array = self.ops.xp.reshape(array, (-1, batch, *array.shape[1:]))
        return self.ops.xp.permute_dims(array, (1, 0, *rest))

    def _no_logprobs(self, batch: int, most: int) -> Logprobs:
        """Return zeros in place of the log probabilities of `most` steps."""
        xp, count = self.ops.xp, min(MOST, self.config.vocab_size)
        return {
            "chosen": xp.zeros((batch, most), dtype=xp.float32),
            "ids": xp.zeros((batch, most, count), dtype=xp.int32),
            "likeliest": xp.zeros((batch, most, count), dtype=xp.float32),
        }

    def score(
        self,
        params: Params,
        cache: list[LayerCache],
        tables: Tables,
        place: Place,
        tokens: Array,
        positions: Array,
    ) -> tuple[list[LayerCache], Array]:
        """Run tokens (B, T); return the cache and the logits after each token, (B, T, V)."""
        hidden, cache = self.hidden(params, cache, tables, place, tokens, positions)
        return cache, graph.logits(self.ops, params, hidden)

    def score_tokens(
        self,
        params: Params,
        cache: list[LayerCache],
        tables: Tables,
        place: Place,
        tokens: Array,
        positions: Array,
        following: Array,
    ) -> tuple[list[LayerCache], Logprobs]:
        """Run tokens (B, T); return the cache and the log probabilities of what follows each token.

        Args:
            following: The token that comes after each token, (B, T) int32.
        """
        cache, logits = self.score(params, cache, tables, place, tokens, positions)
        rows = self.ops.xp.reshape(logits, (-1, logits.shape[-1]))
        found = logprobs(self.ops, rows, self.ops.xp.reshape(following, (-1,)))
        shape = following.shape
        return cache, {
            name: self.ops.xp.reshape(array, (*shape, *array.shape[1:]))
            for name, array in found.items()
        }

    def shift(self, layer: LayerCache, count: Array) -> LayerCache:
        """Free the first `count` (B,) slots of each row of a layer."""
        return self.ops.shift_cache(layer, count)

    def insert(self, layer: LayerCache, row: LayerCache, index: Array, slots: Array) -> LayerCache:
        """Replace a row of a layer; see `Backend.insert_row`."""
        return self.ops.insert_row(layer, row, index, slots)

    def take(self, states: States, rows: Array) -> States:
        """Return the states with the indices `rows` (B,), in this order."""
        take = self.ops.xp.take
        return [{name: take(a, rows, axis=0) for name, a in s.items()} for s in states]

    def put(self, states: States, row: States, index: Array) -> States:
        """Replace the states with the index `index` (1,) by the only ones of `row`."""
        xp = self.ops.xp

        def put(old: Array, new: Array) -> Array:
            is_row = xp.arange(old.shape[0], dtype=xp.int32) == index
            return xp.where(xp.reshape(is_row, (-1, *(1 for _ in old.shape[1:]))), new, old)

        return [
            {name: put(old[name], new[name]) for name in old}
            for old, new in zip(states, row, strict=True)
        ]
