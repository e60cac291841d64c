"""Kernels for NVIDIA cards, written in Python; LLVM makes PTX of them, XLA launches it.

`warp` is what they are written in beside `kernels.lang`, `formats` how weights lie in memory,
`linear` the kernels, `ptx` the way to the card, and `matrix` the functions of JAX arrays.
"""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType


@cache
def find_products() -> tuple[ModuleType | None, str]:
    """The module `matrix`, or None; and what to say of it, or why it cannot be used."""
    if os.environ.get("PHICORE_KERNELS") == "0":
        return None, "switched off by PHICORE_KERNELS=0"
    try:
        from phicore_jax.cuda import matrix, ptx
    except ImportError as error:
        return None, f"{error.name or error} cannot be imported; install llvmlite"
    if not ptx.has_target():
        return None, "this llvmlite cannot write PTX"
    return matrix, ptx.CAPABILITY
