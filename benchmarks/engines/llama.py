"""llama.cpp, through llama-cpp-python."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import llama_cpp as c
import numpy as np

BATCH = 512


class LlamaCpp:
    """llama.cpp, called through its C functions, since its Python class makes needless copies."""

    def __init__(self, model: str, context: int, threads: int, flash_attn: bool) -> None:
        self._options = {
            "model_path": model,
            "n_ctx": context,
            "n_threads": threads,
            "n_threads_batch": threads,
            "flash_attn": flash_attn,
            "n_batch": BATCH,
            "verbose": False,
        }
        self._llama = c.Llama(**self._options)
        self.vocab_size = self._llama.n_vocab()

    def about(self) -> str:
        features = c.llama_print_system_info().decode().partition(":")[2].split("|")
        used = " ".join(f.split()[0] for f in features if f.split()[-1:] == ["1"])
        without = "" if self._options["flash_attn"] else ", no flash attention"
        return f"llama-cpp-python {c.__version__} ({used}){without}"

    def tokens(self, ids: list[int], count: int) -> Iterator[int]:
        """Yield `count` greedily chosen tokens after `ids`."""
        c.llama_memory_clear(c.llama_get_memory(self._llama.ctx), False)
        for _ in range(count):
            ids = [self._next(ids)]
            yield ids[0]

    def _next(self, ids: list[int]) -> int:
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            array = (c.llama_token * len(part))(*part)
            batch = c.llama_batch_get_one(array, len(part))
            if status := c.llama_decode(self._llama.ctx, batch):
                raise RuntimeError(f"llama_decode: {status}")
        scores = c.llama_get_logits_ith(self._llama.ctx, -1)
        return int(np.ctypeslib.as_array(scores, (self.vocab_size,)).argmax())

    def steps(self, prompts: list[list[int]], count: int) -> Iterator[None]:
        """Yield after each of `count` greedy steps of several sequences at once.

        Prompts have one token. Every sequence has its own part of the context, the library's
        default.
        """
        most = len(prompts)
        params = c.llama_context_default_params()
        for name in ("n_threads", "n_threads_batch", "flash_attn_type"):
            setattr(params, name, getattr(self._llama.context_params, name))
        params.n_seq_max, params.n_ctx = most, most * 256
        context = c.llama_init_from_model(self._llama.model, params)
        batch = c.llama_batch_init(most, 0, 1)
        try:
            tokens = [prompt[0] for prompt in prompts]
            for position in range(count):
                batch.n_tokens = most
                for row, token in enumerate(tokens):
                    batch.token[row], batch.pos[row] = token, position
                    batch.n_seq_id[row], batch.seq_id[row][0] = 1, row
                    batch.logits[row] = 1
                if status := c.llama_decode(context, batch):
                    raise RuntimeError(f"llama_decode: {status}")
                tokens = []
                for row in range(most):
                    scores = c.llama_get_logits_ith(context, row)
                    found = np.ctypeslib.as_array(scores, (self.vocab_size,)).argmax()
                    tokens.append(int(found))
                yield
        finally:
            c.llama_batch_free(batch)
            c.llama_free(context)

    def logits(self, ids: list[int]) -> np.ndarray:
        options: dict[str, Any] = {**self._options, "logits_all": True}
        llama = c.Llama(**options)
        llama.eval(ids)
        return llama.scores[: len(ids)]

    def live_bytes(self, position: int) -> int:
        """Return the bytes of keys and values, which are float16 numbers, of all positions.

        The library gives Phi-3's layers no sliding window.
        """
        model = self._llama.model
        heads = c.llama_model_n_head_kv(model)
        dim = c.llama_model_n_embd(model) // c.llama_model_n_head(model)
        return 2 * 2 * heads * dim * c.llama_model_n_layer(model) * position
