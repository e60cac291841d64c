"""Kernels for NVIDIA GPUs, written in Python; LLVM makes PTX of them, XLA launches it.

`warp` is what they are written in beside `kernels.lang`, `formats` how weights lie in memory,
`linear` and `attention` the kernels, `ptx` the way to the GPU, and `runtime` the functions of JAX
arrays. `check` tries them.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phicore_jax.cuda.runtime import CudaKernels


# What XLA puts into a command buffer: its default, loops, and sums over devices. A loop is launched
# as a whole then, and the host need not wait for each step; XLA's least size would leave it out.
OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,"
    "DYNAMIC_SLICE_FUSION,WHILE,COLLECTIVES",
    "xla_gpu_graph_min_graph_size": 1,
}


@cache
def find_kernels() -> tuple[CudaKernels | None, str]:
    """Find the kernels of GPUs, or None; and say which they are, or why there are none."""
    if os.environ.get("PHICORE_KERNELS") == "0":
        return None, "switched off by PHICORE_KERNELS=0"
    try:
        from phicore_jax.cuda import ptx
        from phicore_jax.cuda.runtime import CudaKernels
    except ImportError as error:
        return None, f"{error.name or error} cannot be imported; install llvmlite"
    if not ptx.has_target():
        return None, "this llvmlite cannot write PTX"
    return CudaKernels(), ptx.CAPABILITY


@cache
def working_kernels(device: Any) -> tuple[CudaKernels | None, str]:
    """The kernels of GPUs if they computed the right results on this one; see `find_kernels`."""
    kernels, about = find_kernels()
    if kernels is None:
        return None, about
    from phicore_jax.cuda.check import TriedKernels, fault

    found = fault(device)
    return (TriedKernels(device), about) if found is None else (None, found)
