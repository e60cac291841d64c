"""The tensor protocol: everything that phicore needs from a tensor library.

A backend is a subclass of `Backend`.

Required are `xp`, a namespace of standard array functions, and the two methods `asarray` and
`to_numpy`, which copy arrays between host and device. Everything else is optional. Each operation
has a default that is written in `xp` and defines what the operation means. A fast backend
overrides operations one at a time.

Rules
- An operation returns its result. It changes none of its arguments, except that `update_cache` and
  `shift_cache` may write into the cache that they are given.
- Control flow never depends on the contents of an array, in the graph, in the sampler or in the
  default operations. So every library's compiler can trace them.
- An operation has no state. Its result depends on its arguments alone.
- Several models, each with a backend of its own, may compute in several threads of one process.
- Activations, tables and logits are float32 unless a backend says otherwise in its documentation.
  Token ids, positions, slots and indices are int32.

Positions and slots
- A position is the index of a token in its sequence. It decides how keys and queries are rotated.
- A slot is a place in the cache. It decides where a token's key and value are stored, and which
  keys a token sees. Each row of a batch has its own slots, and the tokens of a row are in
  consecutive slots. Once no later token sees the first tokens, because of the window,
  `shift_cache` frees their slots and moves the other tokens down.

Errors
- phicore calls operations with the documented shapes and dtypes, and with ids, slots and experts
  in range. Behaviour for other inputs is undefined.
- An infinity or a NaN in an argument is no error. The rows that depend on it become infinite or
  NaN, and the sampler reports it.
- If the user asks for a device, an option or an amount of memory that is not there, the backend
  raises a `BackendError`. Its one line says what the user can do.
- Any other exception is a bug of the backend, and is shown to the user as such.

Axes: B sequences, T new tokens, S slots of the cache, R rotated pairs of channels, V vocabulary,
E `hidden_size`, F `intermediate_size`, H `num_attention_heads`, K `num_key_value_heads`,
D `head_dim`, X `num_local_experts`.

`xp` has the `FUNCTIONS` and `DTYPES` below, with the names and meanings of the Python Array API
standard (2024.12). Arrays have `dtype`, `shape`, operators and basic slices. Cache types other than
`f32` need further dtypes: `f16` needs float16 (which the standard does not have), `i16` int16, and
`q8_0` float16 and int8. A cast to one of them must round, even if the result is cast back.
`Capabilities.random_on_device` needs uint32.
`max` returns NaN if a number is NaN. Indices are int32, and one-dimensional in `take`. `where` and
operators take Python numbers. `zeros` and `arange` make arrays on the backend's device.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from phicore.backend import cache_types, philox
from phicore.backend.options import DEFAULTS, SIMPLEST, BackendOptions, Capabilities
from phicore.gguf.matrix import Matrix
from phicore.gguf.reader import GGUFFile

NUM_EXPERTS_PER_TOK = 2
"""Number of experts that compute a token. `expert_linear` gets this many rows for each token."""

VERSION = 2
"""The version of this protocol. It grows when a change breaks existing backends."""

FUNCTIONS = (
    *("abs", "arange", "argmax", "astype", "broadcast_to", "concat", "exp", "expand_dims", "log"),
    *("log1p", "matmul", "max", "maximum", "mean", "permute_dims", "reshape", "round", "sqrt"),
    *("sum", "take", "take_along_axis", "where", "zeros"),
)
"""The functions that `xp` must have."""
DTYPES = ("float32", "int32", "bool")
"""The dtypes that `xp` must have."""

Array = Any
"""An array of the backend's library."""
Weight = Any
"""The result of `load_weight` or `load_experts`. Only operations of the same backend read it."""
LayerCache = dict[str, Array]
"""The keys and values of one layer: arrays by name, whose first three axes are (B, K, S).

A backend may return a subclass that its compiler knows, such as one whose arrays are sharded.
"""


class KeptProgram(ABC):
    """A compiled function for arguments of one form.

    Attributes:
        memory_bytes: About how much memory it takes, apart from arrays; 0 before the first call.
    """

    memory_bytes: int = 0

    @abstractmethod
    def __call__(self, *args: Any) -> Any:
        """Call the function."""

    @abstractmethod
    def prepare(self, *args: Any) -> None:
        """Begin to compile it, or to load it, in a thread. It is not called.

        An error is raised by the first call.

        Args:
            args: Arguments of the form that a later call has. Arrays may be the forms that
                `ProgramStore.outline` loads.
        """


class ProgramStore(ABC):
    """Compiles functions, and keeps the results for later processes."""

    @property
    @abstractmethod
    def outline(self) -> Backend:
        """Return a backend that loads the forms of arrays in place of arrays.

        `KeptProgram.prepare` takes forms, so functions of the weights are compiled while the
        weights are loaded. To load their forms takes no time, and does not read the matrices.
        """

    @abstractmethod
    def compile(self, fn: Callable[..., Any], donate: Sequence[int], identity: str) -> KeptProgram:
        """Return a function that is compiled at its first call, as by `Backend.compile`.

        Args:
            fn, donate: Arguments of `Backend.compile`.
            identity: A text from which follows what `fn` computes, its sources included, but for
                the backend and the forms of the arguments.
        """


class Backend(ABC):
    """A tensor library on a device. The module's docstring has the rules.

    Attributes:
        xp: The namespace of array functions. Required.
        capabilities: The features of this backend on its device.
        options: The options that the user chose, with device, cache type and dtype filled in.
    """

    xp: Any

    def __init__(
        self,
        options: BackendOptions = DEFAULTS,
        capabilities: Capabilities = SIMPLEST,
    ) -> None:
        """Check the options and fill in the backend's defaults.

        Raises:
            BackendError: If the backend does not support an option.
        """
        self.capabilities = capabilities
        self.options = capabilities.accept(options)

    # ---- edges between host and device; `asarray` and `to_numpy` are required --------------

    @abstractmethod
    def asarray(self, x: np.ndarray) -> Array:
        """Copy a host array to the device and keep its dtype."""

    def asarray_of_shares(self, vectors: Sequence[np.ndarray]) -> Array:
        """Copy vectors to the devices as one sharded array.

        Each device gets its share of every vector, and holds these shares one after the other.
        Only a backend with several devices needs this method.
        """
        raise NotImplementedError

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray:
        """Copy a device array to the host. This waits until the array has been computed."""

    def loading(self, file: GGUFFile) -> AbstractContextManager[None]:
        """Return a context in which the matrices of a file are loaded.

        A backend can reuse what it computed when it loaded the file before. The default does
        nothing.
        """
        return nullcontext()

    def load_weight(self, matrix: Matrix) -> Weight:
        """Load a quantized matrix of N rows by K columns onto the device.

        The default returns a dense float32 array of shape (N, K).

        Raises:
            GGUFError: If the matrix has a type that cannot be dequantized.
        """
        return self.asarray(matrix.dequantize())

    def load_experts(self, matrices: Sequence[Matrix]) -> Weight:
        """Load the matrices of X experts onto the device.

        Each has N rows by K columns, and all have the same types. The default returns a dense
        float32 array of shape (X, N, K).

        Raises:
            GGUFError: If the matrices have a type that cannot be dequantized.
        """
        values = np.empty((len(matrices), *matrices[0].shape), np.float32)
        for number, matrix in enumerate(matrices):
            values[number] = matrix.dequantize()
        return self.asarray(values)

    def compile(self, fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
        """Compile a pure function of nested containers (dict, list, tuple, None) of arrays.

        Args:
            fn: The function. The same array may occur several times in its arguments (tied
                weights), and an array may come from a call that was not compiled.
            donate: The indices of arguments that the caller does not use after a call. Their
                buffers may be reused for the result, and their containers may be emptied.
        Returns:
            A function whose results later calls do not change. A lazy library must compute the
            results within the call, since results that are not computed yet keep all arrays alive
            that they depend on.
        """
        return fn

    def kept_programs(self, model: str) -> ProgramStore | None:
        """Return what compiles the functions of a model and keeps them on disk.

        It may begin to load what the last process needed while the model is loaded.

        Args:
            model: A text that tells the model, its weights included, from others.
        Returns:
            None if this backend keeps nothing; `compile` is then called.
        """
        return None

    def while_loop(
        self, condition: Callable[[Any], Array], body: Callable[[Any], Any], state: Any
    ) -> Any:
        """Repeat `state = body(state)` while `condition(state)`, a bool array (1,), is true.

        The default reads the condition on the host, so a compiler cannot trace it.

        Args:
            state: Nested containers of arrays. `body` returns arrays of the same shapes.
        """
        while bool(self.to_numpy(condition(state))[0]):
            state = body(state)
        return state

    def peak_memory_bytes(self) -> int | None:
        """Return the peak of memory in use so far, in bytes, or None if it is unknown."""
        if sys.platform == "win32":
            return None
        import resource  # absent on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    # ---- operations of the network ---------------------------------------------------------

    def linear(self, x: Array, weight: Weight) -> Array:
        """Return x @ weight.T: (..., K) and a loaded (N, K) matrix give (..., N)."""
        flat = self.xp.reshape(x, (-1, x.shape[-1]))
        y = self.xp.matmul(flat, self.xp.permute_dims(weight, (1, 0)))
        return self.xp.reshape(y, (*x.shape[:-1], y.shape[-1]))

    def expert_linear(self, x: Array, experts: Array, weight: Weight) -> Array:
        """Multiply each row by the matrix of its expert: (M, K) gives (M, N).

        The default reads only the weights of the chosen experts if there are fewer rows than
        experts. Otherwise it multiplies all rows by the matrix of every expert.

        Args:
            experts: The expert of each row, (M,) int32.
            weight: X matrices (N, K), as `load_experts` returned them.
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
        """Look up rows of a loaded (V, E) matrix: int32 (B, T) gives (B, T, E)."""
        rows = self.xp.take(weight, self.xp.reshape(ids, (-1,)), axis=0)
        return self.xp.reshape(rows, (*ids.shape, rows.shape[-1]))

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Return weight * x / sqrt(mean(x**2) + eps) over the last axis, in float32."""
        normed = x / self.xp.sqrt(self.xp.mean(x * x, axis=-1, keepdims=True) + eps)
        return self.xp.broadcast_to(weight, x.shape) * normed

    def rms_norm_linear(self, x: Array, norm: Array, eps: float, weight: Weight) -> Array:
        """Return linear(rms_norm(x, norm, eps), weight): (..., K) gives (..., N).

        A backend may fuse the two operations, for example if its product quantizes activations.
        """
        return self.linear(self.rms_norm(x, norm, eps), weight)

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """Return weight * (x - mean(x)) / sqrt(variance(x) + eps) + bias over the last axis."""
        xp = self.xp
        centred = x - xp.mean(x, axis=-1, keepdims=True)
        normed = centred / xp.sqrt(xp.mean(centred * centred, axis=-1, keepdims=True) + eps)
        return xp.broadcast_to(weight, x.shape) * normed + xp.broadcast_to(bias, x.shape)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        """Rotate the first 2R of D channels, in pairs (i, i + R), and keep the other channels.

        Args:
            x: (B, T, heads, D).
            cos, sin: (B, T, R) float32, the cosines and sines of each token's angles.
        """
        r = cos.shape[-1]
        cos, sin = self.xp.expand_dims(cos, axis=2), self.xp.expand_dims(sin, axis=2)
        a, b = x[..., :r], x[..., r : 2 * r]
        parts = [a * cos - b * sin, b * cos + a * sin]
        if 2 * r < x.shape[-1]:
            parts.append(x[..., 2 * r :])
        return self.xp.concat(parts, axis=-1)

    def swiglu(self, gate_up: Array) -> Array:
        """Return silu(gate) * up: (..., 2F), F gates before F ups, gives (..., F)."""
        f = gate_up.shape[-1] // 2
        gate, up = gate_up[..., :f], gate_up[..., f:]
        return gate / (1 + self.xp.exp(-gate)) * up

    def swiglu_linear(self, gate_up: Array, weight: Weight) -> Array:
        """Return linear(swiglu(gate_up), weight): (..., 2K) gives (..., N).

        A backend may fuse the two operations.
        """
        return self.linear(self.swiglu(gate_up), weight)

    # ---- the cache -------------------------------------------------------------------------

    def new_cache(self, batch: int, heads: int, capacity: int, head_dim: int) -> LayerCache:
        """Make an empty cache for one layer with `capacity` slots in each row.

        Slots that are not in use hold zeros, or anything that `attention` does not let through.

        Raises:
            BackendError: If the cache type cannot hold heads of this size.
        """
        shape = batch, heads, capacity, head_dim
        return cache_types.empty(self.xp, self._cache_type, shape)

    @property
    def _cache_type(self) -> str:
        assert self.options.cache_type is not None, "filled in by Capabilities.accept"
        return self.options.cache_type

    def shift_cache(self, cache: LayerCache, count: Array) -> LayerCache:
        """Free the first slots of each row: slot j gets the contents of slot j + count.

        The last `count` slots of a row then hold arbitrary finite numbers. This method may write
        into the cache that it is given.

        Args:
            count: The number of slots to free in each row, (B,) int32.
        """
        xp = self.xp

        def shift(a: Array) -> Array:
            slots = xp.arange(a.shape[2], dtype=xp.int32)[None, :] + count[:, None]  # (B, S)
            slots = xp.where(slots < a.shape[2], slots, a.shape[2] - 1)
            index = xp.reshape(slots, (a.shape[0], 1, a.shape[2], *(1 for _ in a.shape[3:])))
            return xp.take_along_axis(a, xp.broadcast_to(index, a.shape), axis=2)

        return {name: shift(a) for name, a in cache.items()}

    def copy_rows(self, cache: LayerCache, rows: Array, slots: Array, capacity: int) -> LayerCache:
        """Copy rows of a cache into a new one, which may have another number of slots.

        Like `new_cache`, this is not called within a compiled function.

        Args:
            rows: The indices of the rows to copy, in order, (N,) int32. One may occur repeatedly.
            slots: The number of slots of each of these rows that are in use, (N,) int32, at most
                `capacity`. A backend may leave out the others.
            capacity: The number of slots of the new cache.
        Returns:
            A cache of N rows, which shares no memory with the old one.
        """
        take = self.xp.take
        return {n: self._with_slots(take(a, rows, axis=0), capacity) for n, a in cache.items()}

    def insert_row(
        self, cache: LayerCache, row: LayerCache, index: Array, slots: Array
    ) -> LayerCache:
        """Replace one row of a cache by a cache of one row, which may have fewer slots.

        This method may write into the cache that it is given.

        Args:
            row: The new row.
            index: The index of the row to replace, (1,) int32.
            slots: The number of slots of the new row that are in use, (1,) int32. A backend may
                leave out the others.
        """
        xp = self.xp

        def put(old: Array, new: Array) -> Array:
            is_row = xp.arange(old.shape[0], dtype=xp.int32) == index
            new = self._with_slots(new, old.shape[2])
            return xp.where(xp.reshape(is_row, (-1, *(1 for _ in old.shape[1:]))), new, old)

        return {name: put(a, row[name]) for name, a in cache.items()}

    def _with_slots(self, a: Array, capacity: int) -> Array:
        """Give an array (B, K, S, ...) this number of slots: cut it, or add zeros."""
        if a.shape[2] >= capacity:
            return a[:, :, :capacity, ...]
        shape = (*a.shape[:2], capacity - a.shape[2], *a.shape[3:])
        return self.xp.concat([a, self.xp.zeros(shape, dtype=a.dtype)], axis=2)

    def update_cache(self, cache: LayerCache, k: Array, v: Array, slots: Array) -> LayerCache:
        """Store the keys and values of new tokens.

        This method may write into the cache that it is given.

        Args:
            k, v: Keys and values, (B, K, T, D).
            slots: The slots to write, (B, T) int32, consecutive in each row and below S.
        """
        xp = self.xp
        all_slots = xp.arange(cache["k"].shape[2], dtype=xp.int32)  # (S,)
        token = xp.expand_dims(all_slots, axis=0) - slots[:, :1]  # (B, S): which token, if any
        is_new = (token >= 0) & (token < slots.shape[1])
        token = xp.where(is_new, token, 0)[:, None, :]  # (B, 1, S)
        is_new = is_new[:, None, :]

        def put(old: Array, new: Array) -> Array:
            shape = (*is_new.shape, *(1 for _ in old.shape[3:]))
            index = xp.broadcast_to(xp.reshape(token, shape), old.shape)
            picked = xp.take_along_axis(new, index, axis=2)
            return xp.where(xp.reshape(is_new, shape), picked, old)

        new = cache_types.stored(xp, k, v, self._cache_type)
        return {name: put(old, new[name]) for name, old in cache.items()}

    def attention(
        self, q: Array, cache: LayerCache, slots: Array, scale: float, window: int | None
    ) -> Array:
        """Compute causal grouped-query attention of new tokens over the cache.

        A token in slot i sees the slots j with i - window < j <= i (all j <= i if `window` is
        None). The contents of other slots have no influence, as long as they are finite. Query
        head h uses key head h // (H / K). The softmax is computed in float32.

        Args:
            q: The queries, (B, H, T, D).
            cache: The cache, in which the keys and values of the new tokens are already stored.
            slots: The slots of the new tokens, (B, T) int32.
        Returns:
            (B, H, T, D).
        """
        xp = self.xp
        batch, heads, tokens, dim = q.shape
        kv_heads, capacity = cache["k"].shape[1:3]
        k, v = cache_types.numbers(xp, cache)
        i = slots[:, None, None, :, None]  # (B, 1, 1, T, 1)
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

    # ---- operations of the sampler ---------------------------------------------------------

    def contains(self, ids: Array, size: int) -> Array:
        """Tell which numbers from 0 to size - 1 each row has: int32 (B, R) gives bool (B, size).

        Numbers outside of the range are ignored.
        """
        numbers = self.xp.arange(size, dtype=self.xp.int32)[None, :]
        found = numbers == ids[:, :1]
        for r in range(1, ids.shape[1]):
            found = found | (numbers == ids[:, r : r + 1])
        return found

    def uniforms(self, key: Array, step: Array, size: int) -> Array:
        """Make random numbers in (0, 1) for each row: (B, size) float32.

        A row has the numbers of `phicore.network.sampler.uniforms`, bit for bit. This is called
        only if `Capabilities.random_on_device` is true; `xp` must then have uint32, whose sums and
        products are modulo 2**32, with `&`, `^`, `<<` and `>>`. The default takes 235 operations
        for a number.

        Args:
            key: The low and the high half of each row's seed, (B, 2) uint32.
            step: The index of each row's token in its answer, (B,) uint32.
        """
        return philox.uniforms(self.xp, key, step, size)

    def largest(self, x: Array, counts: Array, total: Array) -> Array:
        """Select the largest numbers of each row whose counts sum to `total` or more: bool (B, V).

        The result marks all numbers that are at or above a bound, so equal numbers are selected
        together. The bound is the highest for which the counts reach the total. If the counts of
        the whole row are too few, the whole row is selected.

        The default finds the bound bit by bit: first its exponent, then its 23 bits of fraction.
        This takes 32 sums of V integers. It is faster than sorting in libraries that sort slowly.

        Args:
            x: The numbers, (B, V) float32, 0 or less. A number nearer to 0 than 2**-126 counts as
                0.
            counts: What each number counts, (B, V) int32, 0 or more; the sum of a row is below
                2**31.
            total: The count that each row must reach, (B,) int32, 1 or more.
        """
        xp = self.xp
        distance = -x
        bound = xp.zeros((x.shape[0], 1), dtype=xp.float32) + 2.0**-126

        def raised(bound: Array, trial: Array) -> Array:
            """Return `trial` where numbers nearer to 0 than it count too little, else `bound`."""
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
"""The model's weights, nested as `weights.load_params` returns them."""
