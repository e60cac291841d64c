"""The interface between the backend and its kernels for CPUs or GPUs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gguf import GGMLQuantizationType

from phicore.gguf.reader import GGUFFile, GGUFTensor

Array = Any
Pack = Callable[..., Any]
"""A function with the arguments of `OwnKernels.pack`."""


@dataclass(frozen=True)
class Source:
    """The operation of the protocol that computed activations (M, K), and its arguments.

    Attributes:
        name: The operation, `rms_norm` or `swiglu`.
        arrays: The rows (M, ...) that it was applied to, and its other array arguments.
        eps: The epsilon of `rms_norm`.
    """

    name: str
    arrays: tuple[Array, ...]
    eps: float = 0.0


class OwnKernels(ABC):
    """Kernels as functions of JAX arrays.

    Where a `has_...` method or attribute is false, the backend leaves the operation to XLA.

    Attributes:
        packed: The class of the matrices that `pack` returns.
        cache_type: The default cache type of a backend with these kernels.
        has_threads: Whether `set_threads` works.
        has_rowwise: Whether there are kernels for `rms_norm`, `layer_norm` and `swiglu`.
        has_uniforms: Whether there is a kernel for `uniforms`.
        has_fast_products: Whether `linear` has a faster, less exact way (`is_fast`).
    """

    packed: type
    cache_type: str
    has_threads = False
    has_rowwise = False
    has_fast_products = False
    has_uniforms = False

    @abstractmethod
    def has_type(self, ggml_type: GGMLQuantizationType) -> bool:
        """Return whether matrices of this type can be packed."""

    def has_experts(self, ggml_type: GGMLQuantizationType) -> bool:
        """Return whether the matrices of experts can be packed if they have this type."""
        return False

    @abstractmethod
    def has_cache(self, cache_type: str, tokens: int, dim: int) -> bool:
        """Return whether `store` and `attention` support a step.

        Args:
            tokens: T, the number of new tokens of each sequence.
            dim: D, the number of channels of a head.
        """

    def has_moves(self, cache_type: str) -> bool:
        """Return whether there are kernels that move rows of a cache: the next three methods.

        They leave slots that are not in use as they find the memory, so `attention` must not read
        these.
        """
        return False

    def new_cache(self, shapes: Sequence[Any]) -> list[Array]:
        """Return the arrays of a cache, whose numbers are arbitrary.

        Args:
            shapes: The shape and dtype of each array.
        """
        raise NotImplementedError

    def copy_rows(
        self, arrays: Sequence[Array], rows: Array, slots: Array, capacity: int
    ) -> list[Array]:
        """Copy rows of the arrays of a cache; see `Backend.copy_rows`."""
        raise NotImplementedError

    def insert_row(
        self,
        arrays: Sequence[Array],
        row: Sequence[Array],
        index: Array,
        slots: Array,
    ) -> list[Array]:
        """Replace a row in the arrays of a cache, in place; see `Backend.insert_row`."""
        raise NotImplementedError

    def set_threads(self, threads: int) -> None:
        raise NotImplementedError

    @abstractmethod
    def pack(self, tensors: Sequence[GGUFTensor], count: int = 1) -> Any:
        """Pack stacked tensors of one type into a pytree of arrays.

        Args:
            count: The number of matrices. Each is made of equally many of the tensors.
        """

    @contextmanager
    def loading(self, file: GGUFFile, is_busy: Callable[[], bool]) -> Iterator[Pack]:
        """Return a context in which a file is loaded, with the function that packs its tensors.

        The function may reuse what an earlier process has packed.

        Args:
            is_busy: Returns whether somebody waits for the process. Work for the next process is
                done in the background while nobody does.
        """
        yield self.pack

    def prepared(self, x: Array, source: Source | None) -> Any:
        """Prepare activations (M, K) for `linear`, once for all parts of a weight.

        Args:
            source: The operation that computed x, if known. A kernel may start from its arguments
                instead of x.
        """
        return x

    @abstractmethod
    def linear(
        self, x: Any, w: Any, experts: Array | None = None, *, is_fast: bool = False
    ) -> Array:
        """Multiply x (M, K) by a packed matrix (N, K), or each row by its expert's: (M, N) float32.

        Args:
            x: The activations that `prepared` returned.
            experts: (M,) int32, the expert of each row, if `w` holds a matrix for each expert.
            is_fast: Multiply many rows faster and less exactly, as `fast_prefill` allows.
        """

    @abstractmethod
    def rows(self, index: Array, w: Any) -> Array:
        """Expand the rows `index` (n,) int32 of a packed (N, K) matrix: (n, K) float32."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Scale rows (n, E) to a root mean square of 1, and multiply them by weight (E,)."""
        raise NotImplementedError

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Shift and scale rows (n, E) to mean 0 and variance 1; multiply by weight, add bias."""
        raise NotImplementedError

    def swiglu(self, gate_up: Array) -> Array:
        """Compute silu(gate) * up of rows (n, 2F), which begin with the F gates: (n, F)."""
        raise NotImplementedError

    def uniforms(self, key: Array, step: Array, size: int) -> Array:
        """Compute what `Backend.uniforms` describes."""
        raise NotImplementedError

    @abstractmethod
    def store(
        self, k: Array, v: Array, positions: Array, cache_type: str, cache: Sequence[Array]
    ) -> list[Array]:
        """Store the keys and values (B, K, T, D) of new tokens in a cache, in place.

        Args:
            positions: (B, T) int32, the cache slots of the tokens.
            cache: The cached keys and the cached values, (B, K, S, D), each followed by its scales
                if the cache type has some.
        Returns:
            The updated arrays of the cache.
        """

    @abstractmethod
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
        """Compute attention of scaled queries (B, H, T, D) over keys and values (B, K, S, D).

        Args:
            positions: (B, T) int32, the cache slots of the tokens.
            window: The number of positions that a token sees, its own included; None for all.
            scales: The scales of the keys and those of the values, if the cache type has some.
        """
