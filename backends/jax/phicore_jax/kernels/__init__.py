"""Kernels for XLA on CPUs, written in Python and compiled by LLVM for the processor at hand.

`lang` is the language that kernels are written in. `formats` and `packed` describe how weights are
stored in memory. `linear`, `dense`, `attention` and `rowwise` hold the kernels, and `matrix` what
kernels for matrices share. `pool` runs a kernel on several threads. `build` compiles kernels with
LLVM, and `ffi` registers them with XLA. `runtime` offers them as functions of JAX arrays.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import TYPE_CHECKING

from phicore_jax.kernels.packed import ROWS_OF_STRIP, Packed

if TYPE_CHECKING:
    from phicore_jax.kernels.runtime import Kernels

__all__ = ["ROWS_OF_STRIP", "Packed", "find_kernels"]


@cache
def find_kernels() -> tuple[Kernels | None, str]:
    """Return this process's kernels and their description, or None and why there are none."""
    if os.environ.get("PHICORE_KERNELS") == "0":
        return None, "switched off by PHICORE_KERNELS=0"
    if sys.platform == "win32":
        return None, "not available on Windows yet"
    try:
        from phicore_jax.kernels import build, ffi
        from phicore_jax.kernels.runtime import Kernels
    except ImportError as error:
        return None, f"{error.name or error} cannot be imported; install llvmlite"
    version = ffi.interface_version()
    if version not in ffi.KNOWN:
        found = "unknown" if version is None else "{}.{}".format(*version)
        return None, f"they do not support the FFI version of the installed XLA ({found})"
    names = build.supported_targets()
    name = os.environ.get("PHICORE_CPU", names[0])
    if name not in names:
        return None, f"PHICORE_CPU={name}: this processor has {', '.join(names)}"
    try:
        kernels = Kernels(name)
    except (OSError, RuntimeError) as error:
        return None, f"LLVM: {str(error).partition(chr(10))[0]}"
    return kernels, f"{name}, threads: {kernels.threads}"
