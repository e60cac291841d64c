"""Weights of the graph in the file's format: rows of quantized blocks, of one type or several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGML_QUANT_SIZES

from phicore.errors import BackendError

if TYPE_CHECKING:
    from phicore.gguf.reader import GGUFTensor


@dataclass(frozen=True)
class Split:
    """The way in which a matrix is split over several devices.

    Attributes:
        sections: The numbers of rows of each section, such as queries, keys and values. Each device
            gets its share of the rows of each section, and computes its share of the product. None
            means that each device gets its share of the columns; the devices' products must then
            be added.
        is_gathered: Whether each device needs the complete product of a matrix split by rows.

    Source: Shoeybi et al., "Megatron-LM" (2019).
    """

    sections: tuple[int, ...] | None = None
    is_gathered: bool = False


@dataclass(frozen=True)
class Matrix:
    """A matrix of N rows by K columns, which consists of the rows of one or several tensors.

    For example, the graph's `qkv_proj` consists of `attn_q`, `attn_k` and `attn_v` of a `llama`
    file. These tensors may have different types.

    Attributes:
        parts: The tensors, from the first rows to the last.
        split: The way in which devices split the matrix. None means that it is replicated.
    """

    name: str
    parts: tuple[GGUFTensor, ...]
    split: Split | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def dequantize(self) -> np.ndarray:
        """Expand all values with `gguf.quants`: (N, K) float32."""
        if len(self.parts) == 1:
            return self.parts[0].dequantize()
        return np.concatenate([part.dequantize() for part in self.parts])

    def share(self, device: int, count: int) -> Matrix:
        """Return the part of the matrix that one of `count` devices has.

        Raises:
            BackendError: If `count` does not divide the rows or the blocks.
        """
        if self.split is None:
            return self
        if self.split.sections is None:
            parts = [self._columns(part, device, count) for part in self.parts]
        else:
            parts, start = [], 0
            for rows in self.split.sections:
                if rows % count:
                    raise _indivisible(self.name, f"{rows} rows", count)
                first = start + rows // count * device
                parts += self._rows(first, first + rows // count)
                start += rows
        return Matrix(self.name, tuple(parts))

    def _rows(self, first: int, end: int) -> list[GGUFTensor]:
        found, start = [], 0
        for part in self.parts:
            rows = slice(max(first - start, 0), min(end - start, part.shape[0]))
            start += part.shape[0]
            if rows.start < rows.stop:
                shape = (rows.stop - rows.start, part.shape[1])
                found.append(replace(part, shape=shape, data=part.data[rows]))
        return found

    def _columns(self, part: GGUFTensor, device: int, count: int) -> GGUFTensor:
        block, block_bytes = GGML_QUANT_SIZES[part.type]
        blocks, rest = divmod(part.shape[1], block * count)
        if rest:
            what = f"{part.shape[1] // block} blocks of {part.type.name} in a row"
            raise _indivisible(self.name, what, count)
        width = blocks * block_bytes
        data = part.data[:, device * width : (device + 1) * width]
        return replace(part, shape=(part.shape[0], blocks * block), data=data)


def _indivisible(name: str, what: str, count: int) -> BackendError:
    return BackendError(f"{name}: its {what} cannot be shared by {count} devices; take fewer")
