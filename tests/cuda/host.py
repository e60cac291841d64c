"""Running GPU kernels on the CPU, from the same source: a vector holds the lanes of a warp."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
from phicore_jax.cuda.formats import FORMATS
from phicore_jax.cuda.linear import emit_product, emit_quantize, integers, warps_of
from phicore_jax.cuda.warp import Host
from phicore_jax.kernels.build import optimized, supported_targets, target_machine
from phicore_jax.kernels.lang import I32, I64, PTR, Function, Module, Target, Value

GUARD = 28
"""Number of guard bytes after a result. A kernel must not change them."""


def product(ggml_type: Any, data: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Multiply x (M, K) by a matrix in rows of blocks (N, bytes): (M, N)."""
    fmt = FORMATS[ggml_type]
    planes = [np.array(plane) for plane in fmt.planes(jnp.asarray(data))]
    assert len(planes) == fmt.plane_count
    (m, columns), rows = x.shape, len(data)

    constants = (fmt, (rows, columns), m)
    warps = warps_of(rows, m)
    (y,) = run(emit_product, constants, [*quantize(x), *planes], [((m, rows), np.float32)], warps)
    return y


def quantize(x: np.ndarray) -> list[np.ndarray]:
    """Quantize activations (M, K) to integers; see `emit_quantize` for the results."""
    groups = x.size // 32
    return run(emit_quantize, (groups,), [x], integers(groups), groups)


def run(
    emit: Any,
    constants: tuple[Any, ...],
    operands: Sequence[np.ndarray],
    results: Sequence[tuple[Any, Any]],
    warps: int,
) -> list[np.ndarray]:
    """Compile a kernel for the CPU, run it, and return its results.

    Args:
        operands: The arrays that the kernel takes; it may change them.
        results: The shapes and dtypes of the arrays that the kernel writes.
        warps: The number of warps that are needed; three more are run.
    """
    found = [np.empty(shape, dtype) for shape, dtype in results]
    guarded = [np.full(a.nbytes + GUARD, 42, np.uint8) for a in found]
    arrays = [*operands, *guarded]
    _, function = _compiled(emit, constants, len(arrays))
    # On a GPU, the last block may have more warps than needed.
    function(warps + 3, *(a.ctypes.data for a in arrays))
    for a, memory in zip(found, guarded, strict=True):
        assert (memory[a.nbytes :] == 42).all()
        a[...] = memory[: a.nbytes].view(a.dtype).reshape(a.shape)
    return found


@cache
def _compiled(emit: Any, constants: tuple[Any, ...], pointers: int) -> tuple[Any, Any]:
    """Compile a kernel to a function of the number of warps and of pointers.

    Returns:
        The objects that own the function's memory, and the function.
    """

    def warps(f: Function, count: Value, *args: Value) -> None:
        with f.loop(count) as i:
            emit(Host(f, i.to(I32)), *constants, args)

    target = Target(supported_targets()[0])
    module = Module(target)
    Host.emit_functions(module)
    module.function("kernel", [I64] + [PTR] * pointers, warps)
    code = optimized(module, target_machine(target), lambda m, ir: m.emit_object(ir))
    jit = llvm.create_lljit_compiler(target_machine(target), use_jit_link=True)
    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    builder.export_symbol("kernel")
    library = builder.link(jit, "kernel")
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64, *[ctypes.c_void_p] * pointers)
    return (jit, library), kind(int(library["kernel"]))


# ---- replacements of `ptx.launch` and `ptx.launch_in_place` --------------------------------------


def launch(
    emit: Any, constants: tuple[Any, ...], operands: Sequence[Any], results: Any, warps: int
) -> tuple[Any, ...]:
    def call(*arrays: Any) -> tuple[np.ndarray, ...]:
        shapes = [(r.shape, r.dtype) for r in results]
        return tuple(run(emit, constants, [np.array(a) for a in arrays], shapes, warps))

    return tuple(jax.pure_callback(call, tuple(results), *operands))


def launch_in_place(
    emit: Any, constants: tuple[Any, ...], operands: Sequence[Any], changed: Any, warps: int
) -> tuple[Any, ...]:
    def call(*arrays: Any) -> tuple[np.ndarray, ...]:
        copies = [np.array(a) for a in arrays]
        run(emit, constants, copies, [], warps)
        return tuple(copies[len(operands) :])

    results = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in changed)
    return tuple(jax.pure_callback(call, results, *operands, *changed))
