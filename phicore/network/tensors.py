"""Taking tensors out of a GGUF file, and bringing them to a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from phicore.backend import Backend
from phicore.errors import GGUFError
from phicore.gguf.matrix import Matrix, Split
from phicore.gguf.reader import GGUFFile, GGUFTensor
from phicore.progress import Progress

# Tensors that carry nothing for this graph: the tables that old converters wrote of the rotation.
IGNORED = (".attn_rot_embd.weight", ".attn.rot_embd", ".rope.freqs")


class Tensors:
    """Takes tensors out of a file, checks their shapes and remembers which were taken.

    What `load`, `load_experts`, `matrix` and `vector` return is what the backend made of them.
    """

    def __init__(
        self, ops: Backend, file: GGUFFile, progress: Progress, used: tuple[str, ...] = ()
    ) -> None:
        self._ops = ops
        self._file = file
        self._progress = progress
        self._left = {
            n: t for n, t in file.tensors.items() if n not in used and not n.endswith(IGNORED)
        }
        self._total_bytes = sum(t.size_bytes for t in self._left.values())
        self._done_bytes = 0

    def __contains__(self, name: str) -> bool:
        """Whether the file has this tensor, and it was not taken."""
        return name in self._left

    def take(self, name: str, *shape: int) -> GGUFTensor:
        """A tensor as the file has it; its shape is checked.

        Raises:
            GGUFError: If it is missing, or of another shape.
        """
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise GGUFError(f"{self._file.path.name}: tensor {name!r} is missing")
        if tensor.shape != shape:
            raise GGUFError(
                f"{self._file.path.name}: tensor {name!r}: expected shape {list(shape)} "
                f"by the hyperparameters, found {list(tensor.shape)}"
            )
        return tensor

    def load(self, name: str, *parts: GGUFTensor, split: Split | None = None) -> Any:
        """A matrix of the graph, made of taken tensors one below the other."""
        weight = self._ops.load_weight(Matrix(name, parts, split))
        self._count(*parts)
        return weight

    def load_experts(self, name: str, *parts: GGUFTensor, split: Split | None = None) -> Any:
        """Taken tensors (X, N, K): the parts of a matrix for each expert."""

        def expert(number: int) -> Matrix:
            return Matrix(
                name,
                tuple(replace(p, shape=p.shape[1:], data=p.data[number]) for p in parts),
                split,
            )

        weight = self._ops.load_experts([expert(n) for n in range(parts[0].shape[0])])
        self._count(*parts)
        return weight

    def matrix(self, name: str, rows: int, columns: int, split: Split | None = None) -> Any:
        """A tensor that is a matrix of the graph."""
        return self.load(name, self.take(name, rows, columns), split=split)

    def vector(self, sizes: dict[str, int], *, is_split: bool = False) -> Any:
        """Vectors of these names and sizes, one after the other, as float32.

        Args:
            is_split: Devices share each, as they do the rows of the matrix whose bias it is.
        Raises:
            GGUFError: As `take`, and for numbers that are not finite.
        """
        tensors = [self.take(name, size) for name, size in sizes.items()]
        values = [self._finite(tensor) for tensor in tensors]
        self._count(*tensors)
        if is_split and self._ops.options.devices > 1:
            return self._ops.asarray_of_shares(values)
        return self._ops.asarray(np.concatenate(values))

    def _finite(self, tensor: GGUFTensor) -> np.ndarray:
        values = tensor.dequantize()
        is_finite = np.isfinite(values)
        if not is_finite.all():
            raise GGUFError(
                f"{self._file.path.name}: tensor {tensor.name!r}: expected finite numbers, "
                f"found {values[~is_finite][0]:g}; the file is damaged"
            )
        return values

    def _count(self, *tensors: GGUFTensor) -> None:
        for tensor in tensors:
            self._file.forget(tensor.name)
        self._done_bytes += sum(t.size_bytes for t in tensors)
        self._progress("loading", self._done_bytes, self._total_bytes)

    def check_all_read(self) -> None:
        """Refuse tensors that nobody took: the network would be another.

        Raises:
            GGUFError: With the names of some.
        """
        if self._left:
            names = ", ".join(list(self._left)[:3])
            raise GGUFError(
                f"{self._file.path.name}: {len(self._left)} tensors that this version does not "
                f"use, which would give wrong text: {names}"
            )
