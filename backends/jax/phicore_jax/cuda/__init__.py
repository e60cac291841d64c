"""Kernels for NVIDIA GPUs, written in Python. LLVM compiles them to PTX, and XLA launches the PTX.

- `warp` and `kernels.lang` define the language in which the kernels are written.
- `formats` defines how weights are laid out in GPU memory.
- `linear` and `attention` hold the kernels.
- `ptx` compiles a kernel and launches it.
- `runtime` offers the kernels as functions of JAX arrays.
- `check` tests the kernels on a GPU before they are used.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phicore_jax.cuda.runtime import CudaKernels


# XLA's default list of what goes into a command buffer (a CUDA graph), and in addition loops and
# reductions over devices. One launch then runs a whole loop, and the host need not wait for each
# step. The minimum size of a graph is 1, because XLA's default would leave the loop out.
OPTIONS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,"
    "DYNAMIC_SLICE_FUSION,WHILE,COLLECTIVES",
    "xla_gpu_graph_min_graph_size": 1,
}


@cache
def find_kernels() -> tuple[CudaKernels | None, str]:
    """Return the GPU kernels and their PTX target; or None and the reason why there are none."""
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
    """Return the GPU kernels and their PTX target if they compute correctly on this GPU.

    Otherwise return None and the reason, as `find_kernels` or `check.fault` gives it.
    """
    kernels, about = find_kernels()
    if kernels is None:
        return None, about
    from phicore_jax.cuda.check import TriedKernels, fault

    found = fault(device)
    return (TriedKernels(device), about) if found is None else (None, found)
