"""The engines that `peers.py` compares, each in a process of its own.

An engine is a class with some of these members; a member that is missing leaves its rows out.

- `vocab_size`: the number of tokens.
- `about()`: a line with the versions and the instructions in use.
- `tokens(ids, count)`: an iterator over `count` greedily chosen tokens after a prompt.
- `steps(prompts, count)`: an iterator that goes on after each of `count` greedy steps of several
  sequences at once.
- `logits(ids)`: the logits of all tokens of a prompt, (T, V) float32.
- `live_bytes(position)`: the bytes of keys and values that a step at this position reads.
- `products_s()`: the seconds that the products of one token take alone.

The processes are started with `python -m engines.worker NAME OPTIONS`, each by the Python that has
the library. So a module of this package imports the library of its engine, NumPy, the standard
library and no other module of phicore's, except where the engine needs phicore itself.
"""

from __future__ import annotations

import importlib
from typing import Any

CLASSES = {
    "phicore": "ours:Phicore",
    "llama.cpp": "llama:LlamaCpp",
    "mlx-lm": "mlx_lm_peer:MlxLm",
    "onnxruntime-genai": "onnx_peer:OnnxGenai",
    "transformers": "transformers_peer:Transformers",
}
"""The module and the class of each engine that a Python process runs."""

LIBRARIES = {
    "llama.cpp": "llama_cpp",
    "mlx-lm": "mlx_lm",
    "onnxruntime-genai": "onnxruntime_genai",
    "transformers": "transformers",
}
"""The module by which a Python shows that it has a peer."""


def make(name: str, options: dict[str, Any]) -> Any:
    """Make an engine; this imports its library and loads the model."""
    module, _, attribute = CLASSES[name].partition(":")
    return getattr(importlib.import_module(f"engines.{module}"), attribute)(**options)
