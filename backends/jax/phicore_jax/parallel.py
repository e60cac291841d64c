"""Tensor parallelism after Megatron-LM: several devices share a model.

Each device runs the graph on its own attention heads and feed-forward channels, in a
`jax.shard_map`. The devices exchange data only where a product sums over all heads or channels, or
where each device needs a whole product. A sharded weight or cache is one array, in which the
devices' shares are stacked along the first axis. The devices may belong to several processes, which
all run the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from phicore.errors import BackendError
from phicore_jax.cache import zeros
from phicore_jax.processes import meet

Array = Any

AXIS = "devices"


@jax.tree_util.register_pytree_node_class
class ShardedCache(dict[str, Array]):
    """The cache of a layer, sharded: each device has the keys and values of its heads."""

    def tree_flatten(self) -> tuple[tuple[Array, ...], tuple[str, ...]]:
        """Return the arrays and their names, for JAX."""
        return tuple(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], arrays: Sequence[Array]) -> ShardedCache:
        """Rebuild a cache from the results of `tree_flatten`, for JAX."""
        return cls(zip(names, arrays, strict=True))


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["is_sum", "is_all"])
@dataclass(frozen=True)
class Share:
    """A sharded weight.

    Attributes:
        parts: The parts of the weight. Inside of `shard_map`, they are those of a device's share.
        is_sum: Whether the weight is split by columns, so that the devices' products are added.
        is_all: Whether each device gets the whole product of a weight that is split by rows.
    """

    parts: tuple[Any, ...]
    is_sum: bool
    is_all: bool

    def joined(self, y: Array) -> Array:
        """Combine this device's product with those of the other devices, as the weight requires."""
        if self.is_sum:
            return lax.psum(y, AXIS)
        return lax.all_gather(y, AXIS, axis=y.ndim - 1, tiled=True) if self.is_all else y


class Devices:
    """The devices that share a model.

    Args:
        first: A device of this process. Counting begins at it, or, with several processes, at the
            first device of all processes.
        count: The number of devices, all of the same platform.
    Raises:
        BackendError: If there are fewer devices, or none of them belongs to this process.
    """

    def __init__(self, first: Any, count: int) -> None:
        known = jax.devices(first.platform)
        start = known.index(first) if jax.process_count() == 1 else 0
        found = known[start : start + count]
        if len(found) < count:
            raise BackendError(
                f"devices: {count} asked for, {len(found)} found ({first.platform})"
                + ("" if start == 0 else f" from {first.platform}:{first.id} on")
            )
        self.mesh = Mesh(np.array(found), (AXIS,))
        self.mine = [n for n, d in enumerate(found) if d.process_index == jax.process_index()]
        if not self.mine:
            raise BackendError(
                f"devices: none of the first {count} belongs to this process; use all of them"
            )
        if len(self.mine) < count:
            meet(self.mesh)

    def put(self, x: np.ndarray) -> Array:
        """Replicate an array: copy it to every device."""
        sharding = NamedSharding(self.mesh, P())
        if len(self.mine) == self.mesh.size:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def zeros(self, forms: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
        """Make sharded arrays of zeros; the forms are those of one device's shares."""
        count = self.mesh.size
        whole = (jax.ShapeDtypeStruct((count * f.shape[0], *f.shape[1:]), f.dtype) for f in forms)
        return zeros(tuple(whole), NamedSharding(self.mesh, P(AXIS)))()

    def put_shares(self, shares: Mapping[int, Any]) -> Any:
        """Make sharded arrays of the shares of this process's devices.

        Args:
            shares: A tree of arrays for each device of this process, by the device's number. All
                trees have the same structure and shapes.
        """
        devices = list(self.mesh.devices)

        def stacked(*arrays: np.ndarray) -> Array:
            pairs = zip(arrays, shares, strict=True)
            parts = [jax.device_put(a, devices[number]) for a, number in pairs]
            shape = (self.mesh.size * arrays[0].shape[0], *arrays[0].shape[1:])
            return jax.make_array_from_single_device_arrays(
                shape, NamedSharding(self.mesh, P(AXIS)), parts
            )

        return jax.tree.map(stacked, *shares.values())

    def jit(self, fn: Callable[..., Any], donate: Sequence[int], options: dict[str, Any]) -> Any:
        """Compile a function that each device runs on its shares; otherwise like `jax.jit`."""
        known: dict[Any, Any] = {}

        def jitted(*args: Any) -> Any:
            leaves, structure = jax.tree.flatten(args)
            specs = tuple(leaf.sharding.spec for leaf in leaves)
            if (structure, specs) not in known:
                shared = partial(
                    jax.shard_map,
                    fn,
                    mesh=self.mesh,
                    in_specs=structure.unflatten(specs),
                    check_vma=False,
                )
                results = jax.eval_shape(shared(out_specs=P()), *args)
                known[structure, specs] = jax.jit(
                    shared(out_specs=jax.tree.map(_spec, results, is_leaf=_is_sharded)),
                    donate_argnums=tuple(donate),
                    compiler_options=options,
                )
            return known[structure, specs]

        def call(*args: Any) -> Any:
            return jitted(*args)(*args)

        call.lower = lambda *args: jitted(*args).lower(*args)  # type: ignore[attr-defined]
        return call


def _is_sharded(result: Any) -> bool:
    return isinstance(result, ShardedCache)


def _spec(result: Any) -> P:
    """Return the sharding of a result: caches along their first axis; all others replicated."""
    return P(AXIS) if _is_sharded(result) else P()
