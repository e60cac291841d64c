"""A weight of the graph as the file has it: rows of quantized blocks, of one type or several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from phicore.gguf.reader import GGUFTensor


@dataclass(frozen=True)
class Matrix:
    """N rows by K columns, made of tensors that lie on top of each other.

    `attn_q`, `attn_k` and `attn_v` of a `llama` file are three parts, perhaps of three types, of
    the one `qkv_proj` that the graph has.
    """

    name: str
    parts: tuple[GGUFTensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def dequantize(self) -> np.ndarray:
        """All values as `gguf.quants` gives them: (N, K) float32."""
        if len(self.parts) == 1:
            return self.parts[0].dequantize()
        return np.concatenate([part.dequantize() for part in self.parts])
