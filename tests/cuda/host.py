"""The kernels of cards on this processor: the same source, with vectors for the lanes of a warp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
from phicore_jax.cuda.formats import FORMATS
from phicore_jax.cuda.linear import emit_product, quantize, rows_of_warp
from phicore_jax.cuda.warp import Host
from phicore_jax.kernels.build import optimized, supported_targets, target_machine
from phicore_jax.kernels.lang import I32, I64, PTR, Function, Module, Target, Value

GUARD = 7
"""Numbers behind the result, which must stay as they are."""


def product(ggml_type: Any, data: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x (M, K) by rows of blocks (N, bytes): (M, N)."""
    fmt = FORMATS[ggml_type]
    planes = [np.ascontiguousarray(plane) for plane in fmt.planes(data)]
    assert len(planes) == fmt.plane_count
    (m, columns), rows = x.shape, len(data)

    def warp(f: Function, programs: Value, *args: Value) -> None:
        with f.loop(programs) as i:
            emit_product(Host(f, i.to(I32)), fmt, (rows, columns), m, args)

    y = np.full(m * rows + GUARD, 42, np.float32)
    arrays = [*(np.array(a) for a in quantize(jnp.asarray(x))), *planes, y]
    programs = -(-rows // rows_of_warp(m)) + 1  # a block may have more warps than there are rows
    run(warp, programs, arrays)
    assert (y[m * rows :] == 42).all()
    return y[: m * rows].reshape(m, rows)


def run(warp: Any, programs: int, arrays: Sequence[np.ndarray]) -> None:
    """Compile `warp(f, programs, *pointers)` for this processor, and run it."""
    target = Target(supported_targets()[0])
    module = Module(target)
    Host.emit_gathers(module)
    module.function("kernel", [I64] + [PTR] * len(arrays), warp)
    code = optimized(module, target_machine(target), lambda m, ir: m.emit_object(ir))
    jit = llvm.create_lljit_compiler(target_machine(target))
    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    builder.export_symbol("kernel")
    library = builder.link(jit, "kernel")
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * len(arrays))
    kind(int(library["kernel"]))(programs, *(a.ctypes.data for a in arrays))
