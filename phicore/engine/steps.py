"""What is compiled: pure functions of B rows. They know nothing of sequences or of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phicore.backend import Array, Backend, LayerCache, Params
from phicore.network import graph, sampler
from phicore.network.config import Phi3Config
from phicore.network.processors import LogitsProcessor, check_same
from phicore.network.rope import Tables, rope_at

Kinds = tuple[type[LogitsProcessor], ...]
"""The classes of logits processors, which are compiled into a step."""
States = list[Mapping[str, Array]]
"""The states of logits processors, arrays (B, ...)."""
Place = dict[str, Array]
"""Where rows are: `first`, the position in slot 0 of each row, and `rope_start`, the row of the
rotary tables for position 0; (B,) int32 each."""


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
    ) -> tuple[list[LayerCache], Array, Array, Array, States]:
        """Run tokens, and sample the token that follows the one at index `last` (B,) of each row.

        With the chunks of a prompt this is prefill, with one token a row it is decode.

        Args:
            tokens, positions: (B, T) int32.
            penalty, draw: See `sampler.sample`.
        Returns:
            The cache; the token and the position of the next step, (B, 1) int32; `recent` of its
            penalty; and its states.
        """
        ops, xp = self.ops, self.ops.xp
        hidden, cache = self.hidden(params, cache, tables, place, tokens, positions)
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
    ) -> tuple[list[LayerCache], Array, Array, Array, States, Array]:
        """Run decode steps one after the other, until `count` are done or every row has ended.

        Args:
            token, position: (B, 1) int32, of the first step.
            draw: As for `step`, with `uniforms` (N, B, V) for N steps.
            count: (1,) int32, how many steps are wanted, at most N.
            ends: (B, any) int32, the tokens that end each row. A token below 0 ends a row too.
        Returns:
            What `step` returns, of the last step; and the tokens of all steps, (B, N) int32. What
            follows the token that ended the steps means nothing.
        """
        ops, xp = self.ops, self.ops.xp
        most = ops.capabilities.steps
        only = position[:, 0] * 0
        places = xp.arange(most, dtype=xp.int32)[None, :]

        def goes_on(state: dict[str, Any]) -> Array:
            token = state["token"]
            has_ended = (token == ends) | (token < 0)  # (B, any)
            rows_left = 1 - xp.max(xp.astype(has_ended, xp.int32), axis=1)
            return (state["index"] < count) & (xp.max(rows_left, axis=0, keepdims=True) > 0)

        def step(state: dict[str, Any]) -> dict[str, Any]:
            index, numbers = state["index"], draw
            if draw is not None:
                numbers = {**draw, "uniforms": xp.take(draw["uniforms"], index, axis=0)[0, :, :]}
            cache, token, position, recent, states = self.step(
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
            )
            return {
                "cache": cache,
                "token": token,
                "position": position,
                "recent": recent,
                "states": states,
                "index": index + 1,
                "tokens": xp.where(places == index[:, None], token, state["tokens"]),
            }

        first = {
            "cache": cache,
            "token": token,
            "position": position,
            "recent": penalty["recent"],
            "states": states,
            "index": count * 0,
            "tokens": xp.broadcast_to(token, (token.shape[0], most)),
        }
        s = ops.while_loop(goes_on, step, first)
        names = ("cache", "token", "position", "recent", "states", "tokens")
        return tuple(s[name] for name in names)

    def score(
        self,
        params: Params,
        cache: list[LayerCache],
        tables: Tables,
        place: Place,
        tokens: Array,
        positions: Array,
    ) -> tuple[list[LayerCache], Array]:
        """Run tokens (B, T); return the cache and the logits of all of them, (B, T, V)."""
        hidden, cache = self.hidden(params, cache, tables, place, tokens, positions)
        return cache, graph.logits(self.ops, params, hidden)

    def shift(self, cache: list[LayerCache], count: Array) -> list[LayerCache]:
        """Free the first `count` (B,) slots of each row in every layer."""
        return [self.ops.shift_cache(layer, count) for layer in cache]
