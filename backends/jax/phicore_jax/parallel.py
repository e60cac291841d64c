"""Several devices that share a model: tensor parallelism after Megatron-LM.

Each device runs the graph on its heads and its channels of the feed-forward layers, in a
`jax.shard_map`; the devices meet where a product sums over what they share. What each has of a
weight or a cache is stacked along the first axis of one array. The devices may belong to several
processes, which all run the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from phicore.errors import BackendError

Array = Any

AXIS = "devices"


@jax.tree_util.register_pytree_node_class
class ShardedCache(dict[str, Array]):
    """The cache of a layer, sharded: each device has the keys and values of its heads."""

    def tree_flatten(self) -> tuple[tuple[Array, ...], tuple[str, ...]]:
        """For JAX: the arrays, and their names."""
        return tuple(self.values()), tuple(self)

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], arrays: Sequence[Array]) -> ShardedCache:
        """For JAX: the reverse."""
        return cls(zip(names, arrays, strict=True))


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["is_sum", "is_all"])
@dataclass(frozen=True)
class Share:
    """A sharded weight.

    Attributes:
        parts: The parts of this device's share.
        is_sum: Whether the devices' products are added.
        is_all: Whether each device gets the whole product.
    """

    parts: tuple[Any, ...]
    is_sum: bool
    is_all: bool

    def joined(self, y: Array) -> Array:
        """Turn the product of this device's share into what the graph goes on with."""
        if self.is_sum:
            return lax.psum(y, AXIS)
        return lax.all_gather(y, AXIS, axis=y.ndim - 1, tiled=True) if self.is_all else y


class Devices:
    """The devices that share a model.

    Args:
        first: A device of this process.
        count: How many devices of its kind: `first` and those after it, of all processes.
    Raises:
        BackendError: If there are not so many.
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
            raise BackendError(f"devices: none of the {count} is this process's; take all")

    def put(self, x: np.ndarray) -> Array:
        """Copy an array to every device: it is replicated."""
        sharding = NamedSharding(self.mesh, P())
        if len(self.mine) == self.mesh.size:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Make zeros, a share for each device."""
        sharding = NamedSharding(self.mesh, P(AXIS))
        return jnp.zeros((self.mesh.size * shape[0], *shape[1:]), dtype, device=sharding)

    def put_shares(self, shares: Mapping[int, Any]) -> Any:
        """Shard trees of arrays: copy each to the device of this process whose number it has."""
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
        """Compile what each device does with its shares, as `jax.jit` compiles."""
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
    """Caches are sharded along their first axis; all other results are replicated."""
    return P(AXIS) if _is_sharded(result) else P()
