"""Kernels as PTX, NVIDIA's assembly, which LLVM writes and the driver compiles for its card."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import llvmlite.binding as llvm
from llvmlite import ir

from phicore_jax.cuda.warp import Card, Warp
from phicore_jax.kernels.build import optimized
from phicore_jax.kernels.lang import Function, Module, Target, Value

TRIPLE = "nvptx64-nvidia-cuda"
# Turing's, for which every newer driver and card has an answer: the kernels need nothing newer.
CAPABILITY, VERSION = "sm_75", "+ptx70"
WARPS_OF_BLOCK = 4
GLOBAL = ir.PointerType(addrspace=1)


def has_target() -> bool:
    """Whether this LLVM can write PTX."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        llvm.Target.from_triple(TRIPLE)
    except RuntimeError:
        return False
    return True


def ptx(name: str, arguments: int, emit: Callable[[Warp, Sequence[Value]], None]) -> str:
    """A kernel's PTX.

    Args:
        arguments: How many pointers it takes, all to different memory.
        emit: Writes what a warp does.
    """
    module = Module(Target("cuda"))

    def body(f: Function, *args: Value) -> None:
        emit(Card(f, WARPS_OF_BLOCK), args)

    function = module.function(name, [GLOBAL] * arguments, body)
    function.calling_convention = "ptx_kernel"
    for argument in function.args:
        argument.add_attribute("noalias")
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine(
        cpu=CAPABILITY, features=VERSION, opt=3
    )
    return optimized(module, machine, lambda m, parsed: m.emit_assembly(parsed))
