"""Compiling kernels to PTX, NVIDIA's assembly language, and launching them.

LLVM writes the PTX. XLA takes it as text and launches it like its own kernels, and the driver
compiles it for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from phicore_jax.cuda.warp import GPU, LANES
from phicore_jax.kernels.build import optimized
from phicore_jax.kernels.lang import I32, Function, Module, Target, Value

TRIPLE = "nvptx64-nvidia-cuda"
# The target is Turing: drivers compile its PTX for newer GPUs too, and the kernels need no more.
CAPABILITY, VERSION = "sm_75", "+ptx70"
WARPS_OF_BLOCK = 4
# A promise that a multiprocessor need not hold more blocks than this. Without it, the driver's
# compiler saves registers, and so waits for a few loads before it begins the next ones.
BLOCKS_AT_LEAST = 2
GLOBAL = ir.PointerType(addrspace=1)


def has_target() -> bool:
    """Return whether this LLVM can write PTX."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        llvm.Target.from_triple(TRIPLE)
    except RuntimeError:
        return False
    return True


@cache
def _machine() -> Any:
    assert has_target()
    target = llvm.Target.from_triple(TRIPLE)
    return target.create_target_machine(cpu=CAPABILITY, features=VERSION, opt=3)


Emit = Callable[..., None]
"""A function that writes the code of one warp: `emit(warp, *constants, pointers)`."""


def launch(
    emit: Emit,
    constants: tuple[Any, ...],
    operands: Sequence[Any],
    results: Sequence[Any],
    warps: int,
) -> tuple[Any, ...]:
    """Run a kernel on JAX arrays, and return its results.

    Args:
        emit: Writes the kernel. Its pointers are the operands, then the results.
        constants: Constants that the kernel is compiled for; hashable.
        operands: Arrays that the kernel reads.
        results: The shapes and dtypes of the arrays that the kernel writes.
        warps: The number of warps needed. More may run, since the last block is always full.
    """
    return _call(emit, constants, operands, results, warps, len(operands) + len(results), {})


def launch_in_place(
    emit: Emit,
    constants: tuple[Any, ...],
    operands: Sequence[Any],
    changed: Sequence[Any],
    warps: int,
) -> tuple[Any, ...]:
    """Run a kernel that updates JAX arrays in place, and return the updated arrays.

    Args:
        emit: Writes the kernel. Its pointers are the operands, then the changed arrays.
        constants: Constants that the kernel is compiled for; hashable.
        operands: Arrays that the kernel reads.
        changed: Arrays that the kernel updates.
        warps: The number of warps needed. More may run, since the last block is always full.
    """
    count = len(operands)
    aliases = {count + i: i for i in range(len(changed))}
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in changed]
    # XLA may pass the pointers of the changed arrays a second time, as those of the results. These
    # come last, and a kernel may take fewer pointers than it is passed.
    pointers = count + len(changed)
    return _call(emit, constants, (*operands, *changed), results, warps, pointers, aliases)


def _call(
    emit: Emit,
    constants: tuple[Any, ...],
    operands: Sequence[Any],
    results: Sequence[Any],
    warps: int,
    pointers: int,
    aliases: dict[int, int],
) -> tuple[Any, ...]:
    call = jax.ffi.ffi_call("__gpu$xla.gpu.ptx", tuple(results), input_output_aliases=aliases)
    found = call(
        *operands,
        name=_name(emit),
        kernel_type="ptx",
        kernel_data=ptx(emit, constants, pointers),
        **_sizes("grid", -(-warps // WARPS_OF_BLOCK)),
        **_sizes("block", WARPS_OF_BLOCK * LANES),
        shared_mem_bytes=np.int32(0),
    )
    return tuple(found)


def _name(emit: Emit) -> str:
    return emit.__name__.removeprefix("emit_")


def _sizes(what: str, x: int) -> dict[str, np.int32]:
    return {f"{what}_{axis}": np.int32(x if axis == "x" else 1) for axis in "xyz"}


@cache
def ptx(emit: Emit, constants: tuple[Any, ...], pointers: int) -> str:
    """Compile a kernel to PTX.

    Args:
        pointers: The number of pointers that the kernel takes. Their memory must not overlap.
    """
    module = Module(Target("cuda"))

    def body(f: Function, *args: Value) -> None:
        emit(GPU(f, WARPS_OF_BLOCK), *constants, args)

    function = module.function(_name(emit), [GLOBAL] * pointers, body)
    function.calling_convention = "ptx_kernel"
    limits = {"maxntidx": WARPS_OF_BLOCK * LANES, "minctasm": BLOCKS_AT_LEAST}
    for name, limit in limits.items():
        annotation = [function, name, ir.Constant(I32, limit)]
        module.ir.add_named_metadata("nvvm.annotations", annotation)
    for argument in function.args:
        argument.add_attribute("noalias")
    return optimized(module, _machine(), lambda m, parsed: m.emit_assembly(parsed))
