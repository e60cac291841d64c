"""phicore on one of its backends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import numpy as np

import phicore
from phicore.plugins import Plugins

GREEDY: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1, "seed": 0, "ignore_eos": True}


class Phicore:
    """phicore on one of its backends."""

    def __init__(self, model: str, backend: str, **options: Any) -> None:
        self._backend = backend
        self._model = phicore.load(model, backend, prefix_cache_bytes=0, **options)
        self.vocab_size = self._model.vocab_size
        if backend == "mlx":
            self.products_s = self._mlx_products_s

    def about(self) -> str:
        info = Plugins().backends()[self._backend]
        return f"phicore {version('phicore')}, {info.name} ({info.notes() or info.version})"

    def tokens(self, ids: list[int], count: int) -> Iterator[int]:
        """Return an iterator over `count` greedily chosen tokens after `ids`."""
        generation = self._model.generate(ids, max_tokens=count, **GREEDY)
        return (piece.token_id for piece in generation)

    def steps(self, prompts: list[list[int]], count: int) -> Iterator[None]:
        """Yield after each of `count` greedy steps of several sequences at once."""
        engine = self._model.engine
        with ExitStack() as stack:
            generations = [
                stack.enter_context(self._model.generate(ids, max_tokens=256, **GREEDY))
                for ids in prompts
            ]
            while not all(len(g.token_ids) > 2 for g in generations):  # all run by now
                engine.step()
            for _ in range(count):
                engine.step()
                yield

    def logits(self, ids: list[int]) -> np.ndarray:
        return self._model.logits(ids)

    def live_bytes(self, position: int) -> int:
        """Return the bytes of the slots that a step sees: all, or those of the window."""
        runner = self._model.engine.runner
        window = runner.config.sliding_window or position
        return runner.slot_bytes * min(position, window)

    def _mlx_products_s(self) -> float:
        """Measure the seconds that MLX's products alone take for one token, on one stream."""
        import mlx.core as mx

        runner = self._model.engine.runner
        ops, params, config = runner.ops, runner.params, runner.config
        attended = config.num_attention_heads * config.head_dim
        widths = {
            "qkv_proj": config.hidden_size,
            "o_proj": attended,
            "gate_up_proj": config.hidden_size,
            "down_proj": config.intermediate_size,
        }
        x = {width: mx.random.normal((1, width)) for width in widths.values()}
        mx.eval(x)
        streams, ops._streams = ops._streams, None  # compute on MLX's default stream alone
        started = time.perf_counter()
        try:
            products = [
                ops.linear(x[width], layer[name])
                for layer in params["layers"]
                for name, width in widths.items()
            ]
            head = params.get("lm_head", params["embed_tokens"])
            mx.eval([*products, ops.linear(x[config.hidden_size], head)])
        finally:
            ops._streams = streams
        return time.perf_counter() - started
