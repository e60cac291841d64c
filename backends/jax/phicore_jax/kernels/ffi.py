"""Registration of kernels with XLA as custom calls.

XLA calls a handler with a call frame, which points to structures of XLA's C interface
(xla/ffi/api/c_api.h, shipped with jaxlib). The handler reads their fields at fixed offsets. All
versions of the interface in `KNOWN` have these offsets.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from llvmlite import ir

from phicore_jax.kernels.build import Library
from phicore_jax.kernels.lang import I32, I64, PTR, Function, Module, Value

KNOWN = [(0, minor) for minor in range(3, 6)]
"""Versions (major, minor) of the interface whose structures have been checked."""

# Offsets in 64-bit words: in XLA_FFI_CallFrame with its XLA_FFI_Args and XLA_FFI_Rets, in
# XLA_FFI_Buffer, in XLA_FFI_Metadata_Extension, and in XLA_FFI_Metadata (METADATA_VERSION).
FRAME_EXTENSION, FRAME_ARGS, FRAME_RETS = 1, 9, 14
BUFFER_DATA, BUFFER_DIMS = 3, 5
EXTENSION_TYPE, EXTENSION_METADATA = 1, 3
METADATA_EXTENSION = 1  # the type XLA_FFI_Extension_Metadata, not an offset
METADATA_VERSION = 3


def interface_version() -> tuple[int, int] | None:
    """Return the interface version (major, minor) of the installed XLA, or None if unknown."""
    try:
        header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
        text = header.read_text(encoding="utf-8")
    except (OSError, AttributeError):
        return None
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    return None if None in found else (int(found[0][1]), int(found[1][1]))  # type: ignore[index]


class Buffer:
    """An array that is an argument or a result of a call by XLA."""

    def __init__(self, f: Function, buffer: Value) -> None:
        self._f = f
        self._buffer = buffer

    @property
    def data(self) -> Value:
        return self._f.load(PTR, self._buffer, 8 * BUFFER_DATA)

    def dim(self, axis: int) -> Value:
        return self._f.load(I64, self._f.load(PTR, self._buffer, 8 * BUFFER_DIMS), 8 * axis)


Call = Callable[[Function, Value, Sequence[Buffer], Sequence[Buffer]], None]


def emit_handler(module: Module, name: str, args: int, rets: int, call: Call) -> None:
    """Define the handler `name`; `call(f, pool_state, args, rets)` writes its instructions.

    XLA may also call a handler to ask for its interface version; the handler then only answers.
    The module gets a variable NAME_state, which `register` sets.

    Args:
        args: Number of arrays that are arguments.
        rets: Number of arrays that are results.
    """
    state = ir.GlobalVariable(module.ir, I64, f"{name}_state")
    state.initializer = I64(0)

    def body(f: Function, frame: Value) -> Value:
        extension = f.load(PTR, frame, 8 * FRAME_EXTENSION)
        is_query = f.variable(f.i64(0))
        with f.when(f.is_not_null(extension)):
            kind = f.load(I32, extension, 8 * EXTENSION_TYPE)
            with f.when(kind.equals(METADATA_EXTENSION)):
                metadata = f.load(PTR, extension, 8 * EXTENSION_METADATA)
                major, minor = KNOWN[0]
                f.store(f.i64(major | minor << 32), metadata, 8 * METADATA_VERSION)
                is_query.value = f.i64(1)
        with f.when(is_query.value.equals(0)):

            def buffers(at: int, count: int) -> list[Buffer]:
                pointers = f.load(PTR, frame, 8 * at)
                return [Buffer(f, f.load(PTR, pointers, 8 * i)) for i in range(count)]

            pool_state = f.load(PTR, f.address_of(state))
            call(f, pool_state, buffers(FRAME_ARGS, args), buffers(FRAME_RETS, rets))
        return f.null()

    module.function(name, [PTR], body, result=PTR)


def exports(name: str) -> list[str]:
    return [name, f"{name}_state"]


def register(library: Library, name: str, target: str, pool_state: int) -> None:
    """Register the handler `name` with XLA under the name `target`.

    Args:
        pool_state: Address of the state of the pool whose threads run the kernel.
    """
    ctypes.c_int64.from_address(library.address(f"{name}_state")).value = pool_state
    pointer = ctypes.c_void_p(library.address(name))
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(pointer), platform="cpu")
