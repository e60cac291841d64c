"""The tensor protocol: all that phicore asks of a tensor library.

A backend is a subclass of `Backend`.

Required: `xp`, a namespace of standard array functions, and the two edges `asarray` and `to_numpy`.
Optional: everything else. Each operation has a default that is written in `xp` and defines what it
means; a fast backend overrides those under "fused operations", one at a time.

Rules
- Every operation returns its result, and changes no argument but the cache of `update_cache`.
- Nothing depends on a value: the graph, the sampler and the defaults never look at the contents of
  an array to decide what to do, so that every library's compiler can trace them.
- Several models, each with a backend of its own, may compute at a time in threads of a process.
- Activations, tables and logits are float32 unless a backend says otherwise in its documentation;
  token ids and positions are int32.

Errors
- phicore calls operations with the shapes and dtypes that they name and with ids, positions and
  experts in range; what they do with others is open, and need not be checked.
- An infinity or a NaN in an argument is no error. It stays in the rows that depend on it, and the
  sampler tells of it.
- What the user asked for and cannot have (a device, an option of `configure`, so much memory)
  is a `BackendError` with one line that says what can be done.
- Anything else that is raised is a fault, and reaches the user as one.

Axes: B sequences, T new tokens, S positions the cache has room for, V vocabulary, E `hidden_size`,
F `intermediate_size`, H `num_attention_heads`, K `num_key_value_heads`, D `head_dim`,
X `num_local_experts`.

`xp` has the `FUNCTIONS` and `DTYPES` below, with the names and meanings of the Python Array API
standard (2024.12). Arrays have `dtype`, `shape`, operators and basic slices. Types of a cache other
than `f32` need dtypes of theirs: `f16` float16 (which the standard does not have), `i16` int16,
`q8_0` float16 and int8; a number that is cast to one of these is rounded, even if it is cast back.
`max` gives NaN where a NaN is. Indices are int32, of one dimension in `take`; `where` and operators
take Python numbers; `zeros` and `arange` make arrays on the backend's device.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from phicore.backend import cache_types
from phicore.backend.shapes import PROMPT_CHUNKS
from phicore.errors import BackendError
from phicore.gguf.matrix import Matrix

NUM_EXPERTS_PER_TOK = 2
"""How many experts a token goes to: `expert_linear` is called with this many rows for each."""

VERSION = 1
"""Of this protocol: raised when a backend that was right would no longer be."""

FUNCTIONS = (
    *("abs", "arange", "argmax", "astype", "broadcast_to", "concat", "exp", "expand_dims", "log"),
    *("log1p", "matmul", "max", "maximum", "mean", "permute_dims", "reshape", "round", "sqrt"),
    *("sum", "take", "take_along_axis", "where", "zeros"),
)
"""What `xp` must have."""
DTYPES = ("float32", "int32", "bool")
"""And its dtypes."""

Array = Any
"""An array of the backend's library."""
Weight = Any
"""What `load_weight` made of a matrix; only the same backend's operations look inside."""
LayerCache = dict[str, Array]
"""Keys and values of one layer: arrays whose first three axes are (B, K, S)."""


class Backend(ABC):
    """A tensor library on one device. See the module's text for the rules."""

    xp: Any
    """The namespace of array functions. Required."""
    compiles: bool = False
    """Whether the first call of a compiled function with new shapes takes long: it is announced."""
    compiled_tokens: int | None = None
    """Steps of more tokens than this run as they are, and are not announced; None: all compile."""
    prompt_chunks: tuple[int, ...] = PROMPT_CHUNKS
    """In steps of how many tokens it takes a prompt: 1, and each divides the next. If it compiles,
    these are the shapes it sees, and else the last is the most."""
    asynchronous: bool = False
    """Whether a compiled call returns before its result is there. The engine then starts the next
    step before it reads the last token."""
    steps: int = 1
    """How many decode steps a compiled call runs, where a call costs time: 8 or fewer, since text
    comes when they are done. For more than 1 `while_loop` has to be one that `compile` can take."""

    device_name: str = "cpu"
    """The device it is on, by the name that made it."""
    devices: int = 1
    """How many devices share the model: the graph is that of one (`Phi3Config.share`), `linear`
    makes of the products of a `Matrix.split` what the graph is to go on with, and all but shares of
    weights and caches is the same on each."""
    cache_types: tuple[str, ...] = ("f32",)
    """How it can store keys and values, the default first: types of `cache_types.py`, which the
    defaults store if `xp` has the dtype, or types of its own."""
    linear_error: float = 5e-6
    """A bound of the relative error of `linear` on random numbers: that of float32."""
    has_fast_prefill: bool = False
    """Whether it can multiply prompts faster at the price of exactness."""
    dtypes: tuple[str, ...] = ("float32",)
    """In which types it can multiply prompts, the default first."""
    has_compact: bool = False
    """Whether it can store weights in less memory, at the price of exactness."""
    cache_type: str | None = None
    """What `configure` was given; None is the default."""
    fast_prefill: bool = False
    dtype: str | None = None
    compact: bool = False

    def configure(
        self,
        *,
        cache_type: str | None = None,
        fast_prefill: bool = False,
        threads: int | None = None,
        dtype: str | None = None,
        compact: bool = False,
        devices: int = 1,
    ) -> None:
        """Set what a user may choose, before weights are loaded.

        Args:
            cache_type: One of `cache_types`; None is the first.
            fast_prefill: Multiply prompts with a relative error of up to 1.3e-2 in the logits.
            threads: How many threads compute; None leaves it to the backend. The default cannot
                tell its library.
            dtype: One of `dtypes`; None is the first.
            compact: Round the scales of quantized weights to float16.
            devices: On how many devices, of the kind of the first, to compute.
        Raises:
            BackendError: If this backend cannot do it.
        """
        if devices != 1:
            raise BackendError("devices: this backend computes on one")
        if threads is not None:
            raise BackendError("threads: this backend's library decides, on this device")
        if cache_type is not None and cache_type not in self.cache_types:
            known = ", ".join(self.cache_types)
            raise BackendError(f"cache type {cache_type!r}: this backend has {known}")
        if fast_prefill and not self.has_fast_prefill:
            raise BackendError("fast prefill: this backend has only the exact one, on this machine")
        if dtype is not None and dtype not in self.dtypes:
            known = ", ".join(self.dtypes)
            raise BackendError(f"dtype {dtype!r}: this backend has {known}, on this device")
        if compact and not self.has_compact:
            raise BackendError("compact weights: this backend has only the exact ones")
        self.cache_type = cache_type
        self.fast_prefill = fast_prefill
        self.dtype = dtype
        self.compact = compact

    # ---- edges: host and device. The first two are required --------------------------------

    @abstractmethod
    def asarray(self, x: np.ndarray) -> Array:
        """Copy a host array to the device, dtype kept."""

    def asarray_of_shares(self, vectors: Sequence[np.ndarray]) -> Array:
        """Copy each device's share of these vectors, one after the other, to it."""
        raise NotImplementedError

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """Copy a device array to the host; waits until it has been computed."""

    def load_weight(self, matrix: Matrix) -> Weight:
        """Bring a quantized matrix of N rows by K columns to the device.

        The default is a dense float32 array of shape (N, K).

        Raises:
            GGUFError: If the values of its type are not known.
        """
        return self.asarray(matrix.dequantize())

    def load_experts(self, matrices: Sequence[Matrix]) -> Weight:
        """Bring X matrices of N rows by K columns to the device, all of the same types.

        The default is a dense float32 array of shape (X, N, K).

        Raises:
            GGUFError: If the values of their type are not known.
        """
        values = np.empty((len(matrices), *matrices[0].shape), np.float32)
        for number, matrix in enumerate(matrices):
            values[number] = matrix.dequantize()
        return self.asarray(values)

    def compile(self, fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        """Compile a pure function of nested containers (dict, list, tuple, None) of arrays.

        The arguments numbered in `donate` are not used by the caller after a call, so their
        buffers may be reused for the result, and their containers emptied. An array may be in
        several places of the others (tied weights), and may come from a call that was not compiled.
        Results stay what they are through later calls. A library that computes only what is asked
        for should compute them here, or they would refer to all that they were made of.
        """
        return fn

    def while_loop(
        self, condition: Callable[[Any], Array], body: Callable[[Any], Any], state: Any
    ) -> Any:
        """Call `state = body(state)` as long as `condition(state)`, one bool (1,), is true.

        Args:
            state: Nested containers of arrays; those that `body` returns have the same shapes.

        The default looks at the condition, so a compiler cannot trace it.
        """
        while bool(self.to_numpy(condition(state))[0]):
            state = body(state)
        return state

    def peak_memory_bytes(self) -> int | None:
        """The most memory that was in use so far; None where that is not known."""
        if sys.platform == "win32":
            return None
        import resource  # absent on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    # ---- fused operations ------------------------------------------------------------------

    def linear(self, x: Array, weight: Weight) -> Array:
        """x @ weight.T: (..., K) and a loaded (N, K) matrix give (..., N)."""
        flat = self.xp.reshape(x, (-1, x.shape[-1]))
        y = self.xp.matmul(flat, self.xp.permute_dims(weight, (1, 0)))
        return self.xp.reshape(y, (*x.shape[:-1], y.shape[-1]))

    def expert_linear(self, x: Array, experts: Array, weight: Weight) -> Array:
        """Each row by the matrix of its expert: (M, K) and int32 (M,) give (M, N).

        Reads no other experts' weights for a few rows; the default multiplies many rows by all.

        Args:
            weight: What `load_experts` made of X matrices (N, K).
        """
        xp, count = self.xp, weight.shape[0]
        if x.shape[0] < count:
            rows = []
            for m in range(x.shape[0]):
                picked = xp.take(weight, experts[m : m + 1], axis=0)[0, :, :]  # (N, K)
                rows.append(xp.matmul(x[m : m + 1, :], xp.permute_dims(picked, (1, 0))))
            return xp.concat(rows, axis=0)
        y = xp.zeros((x.shape[0], weight.shape[1]), dtype=xp.float32)
        for number in range(count):
            product = xp.matmul(x, xp.permute_dims(weight[number, :, :], (1, 0)))
            y = xp.where((experts == number)[:, None], product, y)
        return y

    def embedding(self, ids: Array, weight: Weight) -> Array:
        """Rows of a loaded (V, E) matrix: int32 (B, T) gives (B, T, E)."""
        rows = self.xp.take(weight, self.xp.reshape(ids, (-1,)), axis=0)
        return self.xp.reshape(rows, (*ids.shape, rows.shape[-1]))

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """weight * x / sqrt(mean(x**2) + eps) over the last axis, in float32."""
        normed = x / self.xp.sqrt(self.xp.mean(x * x, axis=-1, keepdims=True) + eps)
        return self.xp.broadcast_to(weight, x.shape) * normed

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """weight * (x - mean(x)) / sqrt(variance(x) + eps) + bias over the last axis."""
        xp = self.xp
        centred = x - xp.mean(x, axis=-1, keepdims=True)
        normed = centred / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + eps)
        return xp.broadcast_to(weight, x.shape) * normed + xp.broadcast_to(bias, x.shape)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotate the first 2R of D channels, channel i with channel i + R; the rest passes through.

        Args:
            x: (B, T, heads, D).
            cos, sin: (B, T, R) float32, of the angle of each token's position.
        """
        r = cos.shape[-1]
        cos, sin = self.xp.expand_dims(cos, axis=2), self.xp.expand_dims(sin, axis=2)
        a, b = x[..., :r], x[..., r : 2 * r]
        parts = [a * cos - b * sin, b * cos + a * sin]
        if 2 * r < x.shape[-1]:
            parts.append(x[..., 2 * r :])
        return self.xp.concat(parts, axis=-1)

    def swiglu(self, gate_up: Array) -> Array:
        """silu(gate) * up, where (..., 2F) holds the F gates first: gives (..., F)."""
        f = gate_up.shape[-1] // 2
        gate, up = gate_up[..., :f], gate_up[..., f:]
        return gate / (1 + self.xp.exp(-gate)) * up

    def new_cache(self, batch: int, heads: int, capacity: int, head_dim: int) -> LayerCache:
        """An empty cache of one layer, with room for `capacity` positions.

        Raises:
            BackendError: If the type of cache cannot hold heads of this size.
        """
        cache_type = self.cache_type or self.cache_types[0]
        return cache_types.empty(self.xp, cache_type, (batch, heads, capacity, head_dim))

    def grow_cache(self, cache: LayerCache, capacity: int) -> LayerCache:
        """The same cache with room for `capacity` positions, which is more than it has."""
        xp = self.xp
        return {
            name: xp.concat(
                [a, xp.zeros((*a.shape[:2], capacity - a.shape[2], *a.shape[3:]), dtype=a.dtype)],
                axis=2,
            )
            for name, a in cache.items()
        }

    def shift_cache(self, cache: LayerCache, count: Array) -> LayerCache:
        """Forget the first `count` (B,) positions: slot j holds what slot j + count held.

        The last slots hold something finite that was there before. May use the cache it is handed.
        """
        xp = self.xp

        def shift(a: Array) -> Array:
            slots = xp.arange(a.shape[2], dtype=xp.int32)[None, :] + count[:, None]  # (B, S)
            slots = xp.where(slots < a.shape[2], slots, a.shape[2] - 1)
            index = xp.reshape(slots, (a.shape[0], 1, a.shape[2], *(1 for _ in a.shape[3:])))
            return xp.take_along_axis(a, xp.broadcast_to(index, a.shape), axis=2)

        return {name: shift(a) for name, a in cache.items()}

    def update_cache(self, cache: LayerCache, k: Array, v: Array, positions: Array) -> LayerCache:
        """Store the keys and values of new tokens; may write into the cache it is handed.

        Args:
            k, v: (B, K, T, D).
            positions: (B, T) int32; those of a row are consecutive, and all are below S.
        """
        xp = self.xp
        slots = xp.arange(cache["k"].shape[2], dtype=xp.int32)  # (S,)
        token = xp.expand_dims(slots, axis=0) - positions[:, :1]  # (B, S): which token, if any
        is_new = (token >= 0) & (token < positions.shape[1])
        token = xp.where(is_new, token, 0)[:, None, :]  # (B, 1, S)
        is_new = is_new[:, None, :]

        def put(old: Array, new: Array) -> Array:
            shape = (*is_new.shape, *(1 for _ in old.shape[3:]))
            index = xp.broadcast_to(xp.reshape(token, shape), old.shape)
            picked = xp.take_along_axis(new, index, axis=2)
            return xp.where(xp.reshape(is_new, shape), picked, old)

        new = cache_types.stored(xp, k, v, self.cache_type or self.cache_types[0])
        return {name: put(old, new[name]) for name, old in cache.items()}

    def attention(
        self, q: Array, cache: LayerCache, positions: Array, scale: float, window: int | None
    ) -> Array:
        """Causal grouped-query attention of new tokens over the cache, softmax in float32.

        A token at position i sees the cached positions j with i - window < j <= i (all j <= i if
        `window` is None). What the cache holds beyond has no influence, if it is finite. Query
        head h uses key head h // (H / K).

        Args:
            q: (B, H, T, D).
            cache: already holding the keys and values of these tokens.
            positions: (B, T) int32.
        Returns:
            (B, H, T, D).
        """
        xp = self.xp
        batch, heads, tokens, dim = q.shape
        kv_heads, capacity = cache["k"].shape[1:3]
        k, v = cache_types.numbers(xp, cache)
        i = positions[:, None, None, :, None]  # (B, 1, 1, T, 1)
        j = xp.arange(capacity, dtype=xp.int32)[None, None, None, None, :]  # (1, 1, 1, 1, S)
        visible = j <= i if window is None else (j <= i) & (j > i - window)
        q = xp.reshape(q, (batch, kv_heads, -1, dim))  # (B, K, H / K * T, D)
        scores = xp.matmul(q, xp.permute_dims(k, (0, 1, 3, 2))) * scale
        scores = xp.reshape(scores, (batch, kv_heads, heads // kv_heads, tokens, capacity))
        scores = xp.where(visible, scores, -float("inf"))
        weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        weights = weights / xp.sum(weights, axis=-1, keepdims=True)
        weights = xp.reshape(weights, (batch, kv_heads, -1, capacity))
        return xp.reshape(xp.matmul(weights, v), (batch, heads, tokens, dim))

    def contains(self, ids: Array, size: int) -> Array:
        """Which of the numbers below `size` each row holds: int32 (B, R) gives bool (B, size).

        Numbers outside of the range are ignored.
        """
        numbers = self.xp.arange(size, dtype=self.xp.int32)[None, :]
        found = numbers == ids[:, :1]
        for r in range(1, ids.shape[1]):
            found = found | (numbers == ids[:, r : r + 1])
        return found

    def largest(self, x: Array, counts: Array, total: Array) -> Array:
        """The largest numbers of each row that together count at least `total`: bool (B, V).

        They are all numbers from a bound upwards, so equal ones share their fate, and as few as
        will do; the whole row where none will.

        Args:
            x: (B, V) float32, 0 or less; nearer to 0 than 2**-126 is 0.
            counts: (B, V) int32, 0 or more; those of a row sum to less than 2**31.
            total: (B,) int32, 1 or more.

        The default finds the bound bit by bit: its exponent, then its 23 bits of fraction. That is
        32 sums of V integers, and less than sorting where sorting is not a library's strength.
        """
        xp = self.xp
        distance = -x
        bound = xp.zeros((x.shape[0], 1), dtype=xp.float32) + 2.0**-126

        def raised(bound: Array, trial: Array) -> Array:
            """The trial where those that are nearer to 0 count too little, else the bound."""
            counted = xp.astype(distance < trial, xp.int32) * counts
            counted = xp.sum(counted, axis=-1, keepdims=True, dtype=xp.int32)
            return xp.where(counted < total[:, None], trial, bound)

        for exponent in (64, 64, 64, 32, 16, 8, 4, 2, 1):  # up to 2**127, then infinity
            bound = raised(bound, bound * 2.0**exponent)
        step = bound
        for _ in range(23):
            step = step / 2
            bound = raised(bound, bound + step)
        return distance <= bound


Params = Mapping[str, Any]
"""The model's weights as `loader.load_params` nests them."""
