"""The forms of weights, for which programs are compiled while the weights are still packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from phicore.backend import Array, Backend, BackendOptions, Capabilities, Weight
from phicore.gguf.matrix import Matrix
from phicore.gguf.reader import GGUFTensor
from phicore_jax.kernels import ROWS_OF_STRIP
from phicore_jax.programs import KeptKernels


def joined(parts: Sequence[GGUFTensor]) -> list[list[GGUFTensor]]:
    """Group consecutive parts of the same type, so that one product can take a whole group."""
    groups: list[list[GGUFTensor]] = []
    for part in parts:
        last = groups[-1] if groups else []
        if last and last[-1].type == part.type and last[-1].shape[0] % ROWS_OF_STRIP == 0:
            last.append(part)
        else:
            groups.append([part])
    return groups


class Outline(Backend):
    """Loads the forms of what `JaxBackend` loads on a CPU with kernels. It computes nothing.

    The contents of matrices are not read.
    """

    xp = jnp

    def __init__(
        self,
        kernels: KeptKernels,
        device: Any,
        options: BackendOptions,
        capabilities: Capabilities,
    ) -> None:
        super().__init__(options, capabilities)
        self._kernels = kernels
        self._sharding = SingleDeviceSharding(device)

    def _form(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self._sharding)

    def asarray(self, x: np.ndarray) -> Array:
        return self._form(x.shape, x.dtype)

    def to_numpy(self, x: Array) -> NoReturn:
        raise NotImplementedError("a form has no numbers")

    def load_weight(self, matrix: Matrix) -> Weight:
        return tuple(self._part(group) for group in joined(matrix.parts))

    def load_experts(self, matrices: Sequence[Matrix]) -> Weight:
        groups = zip(*(joined(matrix.parts) for matrix in matrices), strict=True)
        return tuple(
            self._part([tensor for part in group for tensor in part], len(matrices))
            for group in groups
        )

    def _part(self, tensors: Sequence[GGUFTensor], experts: int | None = None) -> Any:
        """Return the form of stacked tensors of one type, which are one matrix or several."""
        first = tensors[0]
        if self._kernels.has_type(first.type):
            packed = self._kernels.form(tensors, experts or 1)
            return jax.tree.map(lambda a: self._form(a.shape, a.dtype), packed)
        # The others are expanded to float32; see `expanded`. Not all of them can be.
        row = np.ascontiguousarray(first.data[:1])
        replace(first, shape=(1, first.shape[1]), data=row).dequantize()
        rows = sum(tensor.shape[0] for tensor in tensors)
        shape = (rows,) if experts is None else (experts, rows // experts)
        return self._form((*shape, first.shape[1]), jnp.float32)
