"""Records the result of each operation of the network by name, on any backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from phicore.backend import Array, Backend, Params
from phicore.engine import Engine
from phicore.network import graph
from phicore.network.rope import rope_at

OPERATIONS = (
    *("embedding", "linear", "expert_linear", "rms_norm", "layer_norm"),
    *("rope", "attention", "swiglu"),
)
"""The recorded operations: those that the graph calls and that return one array."""


def trace(engine: Engine, tokens: Sequence[int]) -> dict[str, np.ndarray]:
    """Run some tokens, at most 256, through the network in one step.

    Returns:
        The results of the operations, in order. The name of a result is that of the weight that the
        operation uses (`layers.0.qkv_proj`) or, without a weight, the layer and the operation
        (`layers.0.attention`).
    """
    runner = engine.runner
    ops = runner.ops
    names: list[str] = []

    def run(params: Params, cache: Any, rope: Any, tokens: Array, slots: Array) -> list[Array]:
        recorder = _Recorder(ops, params)
        recording = cast(Backend, recorder)
        hidden, _ = graph.forward(recording, runner.config, params, rope, tokens, slots, cache)
        graph.logits(recording, params, hidden)
        names[:] = list(recorder.found)
        return list(recorder.found.values())

    ids, slots = np.array([tokens], np.int32), np.arange(len(tokens), dtype=np.int32)[None]
    is_long = runner.tables.is_long(len(tokens))
    tables, start = (
        runner.tables.until(len(tokens), is_long),
        runner.tables.start(is_long),
    )
    rope = rope_at(ops.xp, tables, ops.asarray(slots + np.int32(start)))
    cache = runner.new_cache(len(tokens), is_long)
    arguments = (cache.layers, rope, ops.asarray(ids), ops.asarray(slots))
    arrays = ops.compile(run)(runner.params, *arguments)
    return {name: ops.to_numpy(array) for name, array in zip(names, arrays, strict=True)}


class _Recorder:
    """Wraps a backend and records the results of its operations."""

    def __init__(self, ops: Backend, params: Params) -> None:
        self._ops = ops
        self._names = {id(weight): name for name, weight in _weights(params)}
        self._layer = ""
        self.found: dict[str, Array] = {}

    # Fused operations run as separate operations, so that each result is recorded.

    def rms_norm_linear(self, *args: Any) -> Array:
        return Backend.rms_norm_linear(cast(Backend, self), *args)

    def swiglu_linear(self, *args: Any) -> Array:
        return Backend.swiglu_linear(cast(Backend, self), *args)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._ops, name)
        return self._recording(name, attribute) if name in OPERATIONS else attribute

    def _recording(self, operation: str, call: Callable[..., Array]) -> Callable[..., Array]:
        def recorded(*args: Any) -> Array:
            result = call(*args)
            used = [self._names[id(arg)] for arg in args if id(arg) in self._names]
            name = used[0] if used else f"{self._layer}{operation}"
            if name.startswith("layers."):
                self._layer = ".".join(name.split(".")[:2]) + "."
            # A tied embedding is used twice.
            self.found[name if name not in self.found else f"{name} (output)"] = result
            return result

        return recorded


def _weights(params: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in params.items():
        if name == "layers":
            for number, layer in enumerate(value):
                found += _weights(layer, f"layers.{number}.")
        else:
            found.append((prefix + name, value))
    return found
