"""The interface of a set of kernels to the backend, on a CPU or on a GPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGMLQuantizationType

from phicore.gguf.reader import GGUFTensor

Array = Any


@dataclass(frozen=True)
class Source:
    """How an operation of the protocol made activations (M, K).

    Attributes:
        name: The operation.
        arrays: Its rows (M, ...), and its other arguments.
        eps: The epsilon of a norm.
    """

    name: str
    arrays: tuple[Array, ...]
    eps: float = 0.0


class OwnKernels(ABC):
    """Kernels as functions of JAX arrays. XLA does what a `has_...` denies.

    Attributes:
        packed: The class of a matrix that `pack` made.
        cache_types: The types of caches that the kernels store, the default first.
    """

    packed: type
    cache_types: tuple[str, ...]
    has_threads = False
    has_rowwise = False
    has_fast_products = False

    @abstractmethod
    def has_type(self, ggml_type: GGMLQuantizationType) -> bool:
        """Whether matrices of this type can be packed."""

    def has_experts(self, ggml_type: GGMLQuantizationType) -> bool:
        """Whether matrices of this type can be packed for experts."""
        return False

    @abstractmethod
    def has_cache(self, cache_type: str, tokens: int, dim: int) -> bool:
        """Whether `store` and `attention` take so many tokens and heads of this size."""

    def set_threads(self, threads: int) -> None:
        raise NotImplementedError

    @abstractmethod
    def pack(self, tensors: Sequence[GGUFTensor], count: int = 1) -> Any:
        """Pack stacked tensors of one type into a pytree of arrays.

        Args:
            count: How many matrices the tensors make, each of as many tensors.
        """

    def prepared(self, x: Array, source: Source | None) -> Any:
        """Prepare activations (M, K) for `linear`, once for all parts of a weight.

        Args:
            source: How they were made, if that is known. A kernel may start from it instead.
        """
        return x

    @abstractmethod
    def linear(
        self, x: Any, w: Any, experts: Array | None = None, *, is_fast: bool = False
    ) -> Array:
        """Multiply (M, K) float32 by a packed (N, K) matrix, or each row by its expert's: (M, N).

        Args:
            x: The activations that `prepared` returned.
            experts: (M,) int32, if there is a matrix for each expert.
            is_fast: Multiply many rows less exactly, as `fast_prefill` allows.
        """

    @abstractmethod
    def rows(self, index: Array, w: Any) -> Array:
        """Expand rows of a packed (N, K) matrix: (n,) int32 gives (n, K) float32."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Scale rows (n, E) to a root mean square of 1, times weight (E,)."""
        raise NotImplementedError

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up of rows (n, 2F), gates first: (n, F)."""
        raise NotImplementedError

    @abstractmethod
    def store(
        self, k: Array, v: Array, positions: Array, cache_type: str, cache: Sequence[Array]
    ) -> list[Array]:
        """Store the keys and values (B, K, T, D) of new tokens in a cache, in place.

        Args:
            cache: The rows of keys and of values, (B, K, S, D), each followed by its scales if it
                has any.
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
        """Compute attention of scaled queries (B, H, T, D) over keys and values (B, K, S, D)."""
