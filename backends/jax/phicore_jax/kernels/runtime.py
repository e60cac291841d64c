"""The kernels as functions of JAX arrays.

A kernel is compiled, or read from disk, when a graph first asks for it. Its name states everything
that it is specialized for.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from math import ceil, prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType

from phicore.errors import BackendError
from phicore.gguf.reader import GGUFFile, GGUFTensor
from phicore_jax.cache import rows_of_cache
from phicore_jax.experts import in_tiles
from phicore_jax.kernels import attention, dense, ffi, linear, moves, rowwise
from phicore_jax.kernels.attention import Cache, Rows
from phicore_jax.kernels.build import Compiler
from phicore_jax.kernels.formats import FORMATS
from phicore_jax.kernels.kept import KeptMatrices, kept_matrices
from phicore_jax.kernels.lang import Module, Target
from phicore_jax.kernels.packed import ROWS_OF_STRIP, Packed
from phicore_jax.kernels.pool import Pool, emit_worker, thread_count
from phicore_jax.own import OwnKernels, Pack

Array = Any

HUGE_PAGE = 2 << 20


def _strip_bytes(ggml_type: GGMLQuantizationType, columns: int) -> int:
    if ggml_type in FORMATS:
        return FORMATS[ggml_type].strip_bytes(columns)
    return dense.strip_bytes(ggml_type, columns)


_ALL: list[Kernels] = []


class Kernels(OwnKernels):
    """Kernels for one instruction set, and the threads that run them.

    Args:
        target: The instruction set, one of `build.supported_targets`.
    """

    packed = Packed
    cache_type = "i24"
    has_threads = True
    has_rowwise = True

    def __init__(self, target: str) -> None:
        kind = Target(target)
        self.target = target
        self._compiler = Compiler(kind)
        self.has_fast_products = kind.has_byte_dot or kind.has_byte_pairs
        self._worker = self._compiler.library("worker", emit_worker, ["pool_worker"])
        self._threads = thread_count()
        self._registered: dict[str, tuple[str, str]] = {}
        self._register_lock, self._pool_lock = threading.Lock(), threading.Lock()
        self._pool: Pool | None = None
        # Helper threads and XLA use the code and the state until the process ends: never free them.
        _ALL.append(self)
        self._number = sum(k._compiler.digest == self._compiler.digest for k in _ALL)

    @cached_property
    def pool(self) -> Pool:
        with self._pool_lock:  # several threads may be the first to ask
            if self._pool is None:
                self._pool = Pool(self._worker, self._threads)
            return self._pool

    def set_threads(self, threads: int) -> None:
        """Set the number of threads, including the caller's.

        Raises:
            BackendError: If the pool already runs with another number of threads.
        """
        if "pool" in self.__dict__ and threads != self._threads:
            raise BackendError(
                f"threads: this process already runs kernels with {self._threads}, got {threads}; "
                "use that number, or start another process"
            )
        self._threads = threads

    def has_type(self, ggml_type: GGMLQuantizationType) -> bool:
        return ggml_type in FORMATS or ggml_type in dense.ELEMENT_BYTES

    def has_experts(self, ggml_type: GGMLQuantizationType) -> bool:
        return self.has_type(ggml_type)

    def has_cache(self, cache_type: str, tokens: int, dim: int) -> bool:
        return cache_type in attention.CACHE_TYPES

    @property
    def threads(self) -> int:
        return self._threads

    # ---- weights ---------------------------------------------------------------------------

    @contextmanager
    def loading(self, file: GGUFFile, is_busy: Callable[[], bool]) -> Iterator[Pack]:
        with kept_matrices(file, self._compiler.target.name, is_busy) as kept:
            yield partial(self.pack, kept=kept)

    def pack(
        self, tensors: Sequence[GGUFTensor], count: int = 1, kept: KeptMatrices | None = None
    ) -> Packed:
        """Pack stacked tensors of one type into strips of 16 rows.

        In each matrix, all tensors except the last must have a multiple of 16 rows.

        Args:
            tensors: The tensors of all matrices, matrix after matrix.
            count: Number of matrices; each consists of `len(tensors) / count` tensors.
            kept: Matrices that need not be packed again.
        """
        form = self.form(tensors, count)
        if kept is None:
            return replace(form, strips=self._strips(tensors))
        return replace(form, strips=kept.strips(tensors, count, form.strips.shape, self._strips))

    def form(self, tensors: Sequence[GGUFTensor], count: int = 1) -> Packed:
        """Return what `pack` returns, with the form of the strips in place of an array."""
        rows = sum(tensor.shape[0] for tensor in tensors) // count
        strips = jax.ShapeDtypeStruct(_strips_shape(tensors), jnp.uint8)
        return Packed(strips, tensors[0].type, rows, tensors[0].shape[1])

    def _strips(self, tensors: Sequence[GGUFTensor]) -> np.ndarray:
        ggml_type, columns = tensors[0].type, tensors[0].shape[1]
        strips = _huge_array(_strips_shape(tensors))
        emit = linear.emit_pack if ggml_type in FORMATS else dense.emit_pack
        library = self._compiler.library(
            f"pack-{ggml_type.name}", lambda module: emit(module, ggml_type), ["pack"]
        )
        pack = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(library.address("pack"))
        start = 0
        for tensor in tensors:
            data, to = np.ascontiguousarray(tensor.data), strips[start:]
            args = np.array([data.ctypes.data, to.ctypes.data, len(data), columns], np.int64)
            pack(self.pool.state, args.ctypes.data)
            start += ceil(tensor.shape[0] / ROWS_OF_STRIP)
        return strips

    # ---- operations ------------------------------------------------------------------------

    def linear(
        self, x: Array, w: Packed, experts: Array | None = None, *, is_fast: bool = False
    ) -> Array:
        """Multiply (M, K) float32 by a packed (N, K) matrix, or each row by its expert's: (M, N).

        Args:
            experts: The expert of each row, (M,) int32, if there is a matrix for each expert.
            is_fast: Round activations to 8 bits instead of 16, if there are many rows and the
                processor has fast products of bytes.
        """
        count = w.strips.shape[0] // ceil(w.rows / ROWS_OF_STRIP)
        m = ceil(x.shape[0] / count)  # rows of activations for a matrix, on average
        is_grouped, kind = experts is not None, self._compiler.target
        result = jax.ShapeDtypeStruct((x.shape[0], w.rows), jnp.float32)

        def grouped(tile: int) -> tuple[Array, ...]:
            return () if experts is None else in_tiles(experts, count, tile)

        if w.type not in FORMATS:
            tile = dense.tile(kind, m)
            target = self._target(
                f"{'experts-' if is_grouped else ''}dense-{w.type.name}-{tile}",
                "linear",
                lambda module: dense.emit_linear(module, w.type, tile, is_grouped),
            )
            return jax.ffi.ffi_call(target, result)(x, w.strips, *grouped(tile))
        product = linear.arranged(kind, FORMATS[w.type], m, is_fast=is_fast, is_grouped=is_grouped)
        target = self._target(
            product.name, "linear", lambda module: linear.emit_linear(module, product)
        )
        others = grouped(product.tile)
        tiles = others[0].shape[0] // product.tile if others else ceil(m / product.tile)
        size = product.activation_bytes(tiles, w.columns)
        if not product.is_fused:
            size += 64 + self.threads * product.sums_bytes(tiles)
        workspace = jax.ShapeDtypeStruct((size,), jnp.uint8)
        return jax.ffi.ffi_call(target, (result, workspace))(x, w.strips, *others)[0]

    def rows(self, ids: Array, w: Packed) -> Array:
        """Expand rows of a packed (N, K) matrix: (n,) int32 gives (n, K) float32."""
        emit = linear.emit_rows if w.type in FORMATS else dense.emit_rows
        target = self._target(f"rows-{w.type.name}", "rows", lambda module: emit(module, w.type))
        result = jax.ShapeDtypeStruct((ids.shape[0], w.columns), jnp.float32)
        return jax.ffi.ffi_call(target, result)(ids, w.strips)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Scale rows (n, E) to a root mean square of 1, and multiply them by weight (E,)."""
        target = self._target("rms-norm", "rms_norm", rowwise.emit_rms_norm)
        result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return jax.ffi.ffi_call(target, result)(x, weight, np.array([eps], np.float32))

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Shift and scale rows (n, E) to mean 0 and variance 1; multiply by weight, add bias."""
        target = self._target("layer-norm", "layer_norm", rowwise.emit_layer_norm)
        result = jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return jax.ffi.ffi_call(target, result)(x, weight, bias, np.array([eps], np.float32))

    def swiglu(self, gate_up: Array) -> Array:
        """Compute silu(gate) * up (n, F) from rows (n, 2F), which hold gates before ups."""
        target = self._target("swiglu", "swiglu", rowwise.emit_swiglu)
        n, width = gate_up.shape
        return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((n, width // 2), jnp.float32))(gate_up)

    # ---- cache -----------------------------------------------------------------------------

    def store(
        self, k: Array, v: Array, positions: Array, cache_type: str, cache: Sequence[Array]
    ) -> list[Array]:
        """Store the keys and values (B, K, T, D) of new tokens in a cache, in place.

        Args:
            positions: The slots of the tokens in the cache, (B, T) int32.
            cache: The rows of keys and of values, (B, K, S, D), each followed by its scales if it
                has any.
        """
        kind = _cache(cache_type, k.shape[3])
        target = self._target(
            f"store-{kind.name}",
            "store",
            lambda module: attention.emit_store(module, kind),
        )
        results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in cache]
        aliases = {3 + i: i for i in range(len(cache))}
        call = jax.ffi.ffi_call(target, results, input_output_aliases=aliases)
        return list(call(k, v, positions, *cache))

    def has_moves(self, cache_type: str) -> bool:
        return cache_type in attention.CACHE_TYPES

    def new_cache(self, shapes: Sequence[Any]) -> list[Array]:
        count = len(shapes)
        target = self._target(
            f"empty-{count}", "empty", lambda module: moves.emit_empty(module, count)
        )
        return list(jax.ffi.ffi_call(target, tuple(shapes))())

    def copy_rows(
        self, arrays: Sequence[Array], rows: Array, slots: Array, capacity: int
    ) -> list[Array]:
        target = self._moves("copy_rows", arrays)
        results = [
            jax.ShapeDtypeStruct((rows.shape[0], a.shape[1], capacity, *a.shape[3:]), a.dtype)
            for a in arrays
        ]
        return list(jax.ffi.ffi_call(target, results)(rows, slots, *arrays))

    def insert_row(
        self,
        arrays: Sequence[Array],
        row: Sequence[Array],
        index: Array,
        slots: Array,
    ) -> list[Array]:
        target = self._moves("insert_row", arrays)
        results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
        aliases = {2 + len(arrays) + i: i for i in range(len(arrays))}
        call = jax.ffi.ffi_call(target, results, input_output_aliases=aliases)
        return list(call(index, slots, *row, *arrays))

    def _moves(self, handler: str, arrays: Sequence[Array]) -> str:
        slot_bytes = [prod(a.shape[3:]) * a.dtype.itemsize for a in arrays]
        emit = moves.emit_copy_rows if handler == "copy_rows" else moves.emit_insert_row
        return self._target(
            "-".join([handler.replace("_", "-"), *map(str, slot_bytes)]),
            handler,
            lambda module: emit(module, slot_bytes),
        )

    def attention(
        self,
        q: Array,
        positions: Array,
        window: int | None,
        cache_type: str,
        keys: Array,
        values: Array,
        *scales: Array,
    ) -> Array:
        """Compute attention of scaled queries (B, H, T, D) over keys and values (B, K, S, D)."""
        cache = _cache(cache_type, q.shape[3])
        group = q.shape[1] // keys.shape[1] if q.shape[2] == 1 else None
        target = self._target(
            f"attention-{cache.name}-{'many' if group is None else group}",
            "attention",
            lambda module: attention.emit_attention(module, cache, group),
        )
        width = np.array([2**31 - 1 if window is None else window], np.int32)
        result = jax.ShapeDtypeStruct(q.shape, jnp.float32)
        return jax.ffi.ffi_call(target, result)(q, positions, width, keys, values, *scales)

    def _target(self, name: str, handler: str, emit: Callable[[Module], None]) -> str:
        """Return the name under which XLA knows a kernel; compile and register it if needed."""
        # XLA finds compiled programs on disk by the names of their targets: they need the digest.
        # A name can be registered once in a process: the first `Kernels` has no suffix.
        suffix = "" if self._number == 1 else f"-{self._number}"
        target = f"phicore-{name}-{self._compiler.digest}{suffix}"
        with self._register_lock:
            if target not in self._registered:
                library = self._compiler.library(name, emit, ffi.exports(handler))
                ffi.register(library, handler, target, self.pool.state)
                self._registered[target] = name, handler
        return target

    # ---- programs that are kept on disk (see `programs.py`) --------------------------------

    @property
    def identity(self) -> str | None:
        """Return a text that tells what the kernels compute, and with how many threads.

        It is None for further instances, since their kernels have names of their own.
        """
        return f"{self._compiler.digest} {self.threads}" if self._number == 1 else None

    def handlers(self, text: str) -> list[tuple[str, str]]:
        """Return name and handler of each kernel that the text of a program names."""
        return [pair for target, pair in self._registered.items() if f'{target}"' in text]

    def provide(self, name: str, handler: str) -> None:
        """Register a kernel that was compiled before.

        Raises:
            LookupError: If its code is not on disk any more.
        """

        def missing(module: Module) -> None:
            raise LookupError(f"kernel {name} is not on disk")

        self._target(name, handler, missing)


def _cache(cache_type: str, dim: int) -> Cache:
    keys, values = rows_of_cache(cache_type)
    return Cache(Rows(keys.name, dim), Rows(values.name, dim))


def _strips_shape(tensors: Sequence[GGUFTensor]) -> tuple[int, int]:
    count = sum(ceil(t.shape[0] / ROWS_OF_STRIP) for t in tensors)
    return count, _strip_bytes(tensors[0].type, tensors[0].shape[1])


def _huge_array(shape: tuple[int, int]) -> np.ndarray:
    """Allocate uint8 memory, in huge pages where the system has them.

    Walking the page tables of small pages costs a third.
    """
    size = shape[0] * shape[1]
    if size < HUGE_PAGE:
        memory = np.empty(size + 64, np.uint8)
        start = -memory.ctypes.data % 64  # JAX does not copy arrays that are aligned so
        return memory[start : start + size].reshape(shape)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # shared memory has no huge pages by default
    region = mmap.mmap(-1, size + HUGE_PAGE, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(region, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE
    return memory[start : start + size].reshape(shape)
