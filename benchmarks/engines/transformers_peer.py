"""transformers on torch, which reads GGUF files itself and expands the weights.

It is measured in float32 on a CPU, where its logits are the reference, and needs 4 bytes for each
weight, twice that while it loads. Its own way to keep quantized weights on a CPU, torchao, is not
measured: it quantizes the expanded weights anew, so its numbers would not be those of the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import DynamicCache


class Transformers:
    """transformers' model of a GGUF file."""

    def __init__(self, model: str) -> None:
        path = Path(model)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)  # a newer name of `past_key_values`
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        ).eval()
        self.vocab_size = self._model.config.vocab_size

    def about(self) -> str:
        used = f"torch {torch.__version__}, float32, {torch.get_num_threads()} threads"
        return f"transformers {transformers.__version__} ({used})"

    def tokens(self, ids: list[int], count: int) -> Iterator[int]:
        """Yield `count` greedily chosen tokens after `ids`."""
        yield from self._greedy([ids], count)

    def steps(self, prompts: list[list[int]], count: int) -> Iterator[None]:
        """Yield after each of `count` greedy steps of several sequences at once."""
        for _ in self._greedy(prompts, count):
            yield

    @torch.inference_mode()
    def _greedy(self, prompts: list[list[int]], count: int) -> Iterator[int]:
        cache = DynamicCache(config=self._model.config)
        tokens = torch.tensor(prompts)
        for _ in range(count):
            found = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens = found.logits[:, -1].argmax(dim=-1, keepdim=True)
            yield int(tokens[0])

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> np.ndarray:
        return self._model(torch.tensor([ids])).logits[0].float().numpy()

    def live_bytes(self, position: int) -> int:
        """Return the bytes of keys and values, which are float32 numbers, of all positions."""
        config = self._model.config
        heads = config.num_key_value_heads
        dim = config.hidden_size // config.num_attention_heads
        return 2 * 4 * heads * dim * config.num_hidden_layers * position
