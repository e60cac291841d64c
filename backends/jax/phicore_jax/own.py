"""What kernels of our own are to the backend, on a CPU or on a card."""

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
    """What activations (M, K) were made of, by an operation of the protocol.

    Attributes:
        name: Of the operation.
        arrays: Rows (M, ...), and what else it takes.
        eps: Of a norm.
    """

    name: str
    arrays: tuple[Array, ...]
    eps: float = 0.0


class OwnKernels(ABC):
    """Functions of JAX arrays. What a `has_...` denies is left to XLA.

    Attributes:
        packed: The class of a matrix that `pack` has made.
        cache_types: Those of `cache_types` and i24, the default first.
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
        """Whether many of one type can be packed as one, and `linear` takes experts."""
        return False

    @abstractmethod
    def has_cache(self, cache_type: str, tokens: int, dim: int) -> bool:
        """Whether so many rows of this size can be stored, and their attention computed."""

    def set_threads(self, threads: int) -> None:
        raise NotImplementedError

    @abstractmethod
    def pack(self, tensors: Sequence[GGUFTensor], count: int = 1) -> Any:
        """A pytree of arrays, of tensors of one type that lie on top of each other.

        Args:
            count: How many matrices they are, with as many tensors each.
        """

    def prepared(self, x: Array, source: Source | None) -> Any:
        """Activations (M, K) as `linear` takes them: once for all parts of a weight.

        Args:
            source: What they were made of, if it is known; it can be used in their place.
        """
        return x

    @abstractmethod
    def linear(
        self, x: Any, w: Any, experts: Array | None = None, *, is_fast: bool = False
    ) -> Array:
        """(M, K) float32 by a packed (N, K) matrix, or each row by that of its expert: (M, N).

        Args:
            x: As `prepared` gives them.
            experts: (M,) int32, if there is a matrix for each expert.
            is_fast: Be less exact, as `fast_prefill` allows, if there are many rows.
        """

    @abstractmethod
    def rows(self, index: Array, w: Any) -> Array:
        """Rows of a packed (N, K) matrix: (n,) int32 gives (n, K) float32."""

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Rows (n, E) of root mean square 1, times weight (E,)."""
        raise NotImplementedError

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up of rows (n, 2F), gates first: (n, F)."""
        raise NotImplementedError

    @abstractmethod
    def store(
        self, k: Array, v: Array, positions: Array, cache_type: str, cache: Sequence[Array]
    ) -> list[Array]:
        """Put the keys and values (B, K, T, D) of new tokens into a cache, in place.

        Args:
            cache: Rows of keys and values, (B, K, S, D), each followed by its scales if it has any.
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
        """Attention of scaled queries (B, H, T, D) over keys and values (B, K, S, D)."""
