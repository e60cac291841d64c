"""Kernels for XLA on a CPU, written in Python and compiled by LLVM for the processor at hand.

`lang` is the language they are written in, `formats` how weights lie in memory, `linear`, `dense`
and `attention` the kernels, `pool` the threads, `build` and `ffi` the ways to LLVM and XLA, and
`runtime` the functions of JAX arrays that come out.
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
    """The kernels of this process, or None; and which they are, or why there are none."""
    if os.environ.get("PHICORE_KERNELS") == "0":
        return None, "switched off by PHICORE_KERNELS=0"
    if sys.platform == "win32":
        return None, "not made for Windows yet"
    try:
        from phicore_jax.kernels import build, ffi
        from phicore_jax.kernels.runtime import Kernels
    except ImportError as error:
        return None, f"{error.name or error} cannot be imported; install llvmlite"
    version = ffi.interface_version()
    if version not in ffi.KNOWN:
        found = "unknown" if version is None else "{}.{}".format(*version)
        return None, f"made for another version of XLA's interface than the installed one ({found})"
    names = build.supported_targets()
    name = os.environ.get("PHICORE_CPU", names[0])
    if name not in names:
        return None, f"PHICORE_CPU={name}: this processor has {', '.join(names)}"
    try:
        kernels = Kernels(name)
    except (OSError, RuntimeError) as error:
        return None, f"LLVM: {str(error).partition(chr(10))[0]}"
    return kernels, f"{name}, threads: {kernels.threads}"
