"""Takes tensors from a GGUF file and loads them onto a backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from phicore.backend import Backend
from phicore.errors import GGUFError
from phicore.gguf.matrix import Matrix, Split
from phicore.gguf.reader import GGUFFile, GGUFTensor
from phicore.progress import Progress

# Tensors that this graph does not need: rotary tables that old converters wrote, under the names of
# the gguf package and others. (`rope_freqs.weight` is another tensor: it holds factors.)
IGNORED = (".attn_rot_embd", ".attn_rot_embd.weight", ".attn.rot_embd", ".rope.freqs")
IGNORED_NAMES = ("rope_freqs",)
# A matrix of one of these types may have its scale in a tensor beside it. NVIDIA's converters have
# one for the activations, too, from which their hardware makes 4-bit numbers; it is not used here.
SCALED_TYPES = (GGMLQuantizationType.NVFP4,)
SCALE, INPUT_SCALE = ".scale", ".input_scale"


class Tensors:
    """Takes tensors from a file, checks their shapes and records which were taken.

    `load`, `load_experts`, `matrix` and `vector` return the weights that the backend loaded.
    """

    def __init__(
        self, ops: Backend, file: GGUFFile, progress: Progress, used: tuple[str, ...] = ()
    ) -> None:
        self._ops = ops
        self._file = file
        self._progress = progress
        self._left = {
            n: t
            for n, t in file.tensors.items()
            if n not in (*used, *IGNORED_NAMES) and not n.endswith(IGNORED)
        }
        self._total_bytes = sum(
            t.size_bytes for n, t in self._left.items() if not n.endswith((SCALE, INPUT_SCALE))
        )
        self._done_bytes = 0

    def __contains__(self, name: str) -> bool:
        """Return whether the file has this tensor and it was not taken yet."""
        return name in self._left

    def take(self, name: str, *shape: int) -> GGUFTensor:
        """Take a tensor as it is in the file, and check its shape.

        Raises:
            GGUFError: If the tensor is missing or has another shape.
        """
        tensor = self._left.pop(name, None)
        if tensor is None:
            raise GGUFError(f"{self._file.path.name}: tensor {name!r} is missing")
        if tensor.shape != shape:
            raise GGUFError(
                f"{self._file.path.name}: tensor {name!r}: expected shape {list(shape)} "
                f"by the hyperparameters, found {list(tensor.shape)}"
            )
        stem = name.removesuffix(".weight")
        if tensor.type in SCALED_TYPES and stem + SCALE in self._left:
            matrices = 1 if len(shape) < 3 else shape[0]
            scale = self._finite(self.take(stem + SCALE, matrices))
            self._left.pop(stem + INPUT_SCALE, None)
            return replace(tensor, scale=scale)
        return tensor

    def load(self, name: str, *parts: GGUFTensor, split: Split | None = None) -> Any:
        """Load a matrix of the graph whose rows are those of the taken tensors, in order."""
        weight = self._ops.load_weight(Matrix(name, parts, split))
        self._count(*parts)
        return weight

    def load_experts(self, name: str, *parts: GGUFTensor, split: Split | None = None) -> Any:
        """Load the matrices of X experts from taken tensors (X, N, K).

        If there are several tensors, the matrix of an expert has the rows of each, in order.
        """

        def expert(number: int) -> Matrix:
            return Matrix(
                name,
                tuple(
                    replace(
                        p,
                        shape=p.shape[1:],
                        data=p.data[number],
                        scale=None if p.scale is None else p.scale[number : number + 1],
                    )
                    for p in parts
                ),
                split,
            )

        weight = self._ops.load_experts([expert(n) for n in range(parts[0].shape[0])])
        self._count(*parts)
        return weight

    def matrix(self, name: str, rows: int, columns: int, split: Split | None = None) -> Any:
        """Take one tensor and load it as a matrix of the graph."""
        return self.load(name, self.take(name, rows, columns), split=split)

    def vector(self, sizes: dict[str, int], *, is_split: bool = False) -> Any:
        """Take vectors and load them as one float32 array, one after the other.

        Args:
            sizes: The size of each tensor, by name.
            is_split: Whether each vector is sharded over the devices, as the rows of the matrix
                are to which the bias belongs.
        Raises:
            GGUFError: If a tensor is missing, has another shape or has numbers that are not finite.
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
        """Check that every tensor of the file was taken.

        A tensor that is not used would mean another network, and wrong text.

        Raises:
            GGUFError: If a tensor was not taken. The message names up to three.
        """
        if self._left:
            names = ", ".join(list(self._left)[:3])
            raise GGUFError(
                f"{self._file.path.name}: {len(self._left)} tensors that this version does not "
                f"use, which would give wrong text: {names}"
            )
