"""Where parameters, sums and examples lie on a mesh, and what the devices tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dptrain.core import checks

from .uses import accumulated


def placement(mesh: Mesh | None, shard_params: bool) -> Placement | None:
    """Where things lie on this mesh; None without one.

    Raises:
        TypeError, ValueError: see ``Placement``; or parameters are to be sharded, but there is no mesh.
    """
    if shard_params and mesh is None:
        raise ValueError("shard_params divides parameters among the devices of a mesh: pass mesh= as well.")
    return None if mesh is None else Placement(mesh, shard_params)


class Placement:
    """The examples of a physical batch over all devices of a mesh, in equal parts.

    Parameters lie on every device, or, with ``shard_params``, in shards of their largest dimension that the
    number of devices divides; a parameter without one lies on every device. Noisy gradients and
    the optimizer's state lie in such shards in either case.

    A sum that is not complete has a leading axis, over which it is yet to be added: of one element where
    the devices have added up their parts already, else of one for each device.

    Args:
        mesh: of any number of axes; what they are called does not matter.
        shard_params: whether parameters lie in shards.

    Raises:
        TypeError: no mesh of devices.
        ValueError: some processes, but not all, have devices on the mesh; or arrays are typed by how they are
            sharded (``jax.set_mesh`` of explicit axes).
    """

    def __init__(self, mesh: Mesh, shard_params: bool = False):
        if not isinstance(mesh, Mesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh of devices, and is {checks.shown(mesh)}.")
        context = jax.sharding.get_abstract_mesh()
        if AxisType.Explicit in context.axis_types:
            raise ValueError(
                "this is called inside of jax.set_mesh with axes of the type Explicit, where the type of an "
                "array says how it is sharded: call it outside of it, or give that mesh axes of type Auto."
            )
        processes = {device.process_index for device in mesh.devices.flat}
        if len(processes) not in (1, jax.process_count()):
            raise ValueError(
                f"the mesh has devices of {len(processes)} of {jax.process_count()} processes: use those of "
                "one, or of all."
            )
        # Axes of the explicit type, which jax.make_mesh gives, would be a part of every array's type.
        self.mesh, self.shard_params = Mesh(mesh.devices, mesh.axis_names), shard_params
        self.devices, self.axes = mesh.devices.size, mesh.axis_names
        self.has_others = len(processes) > 1
        self.rows = PartitionSpec(self.axes)

    def dimension(self, shape: tuple[int, ...]) -> int | None:
        """In which a leaf is cut: the largest that the number of devices divides, of equals the first."""
        divided = [i for i, n in enumerate(shape) if n and n % self.devices == 0]
        return max(divided, key=lambda i: shape[i], default=None)

    def shards(self, tree: Any) -> Any:
        """Specifications of leaves that lie in shards."""
        return jax.tree.map(lambda x: self._shard(jnp.shape(x)), tree)

    def params(self, tree: Any) -> Any:
        """Those of parameters."""
        return self.shards(tree) if self.shard_params else jax.tree.map(lambda _: PartitionSpec(), tree)

    def incomplete(self, params: Any) -> Any:
        """Those of sums that are not complete."""

        def one(x: Any) -> PartitionSpec:
            return PartitionSpec(None, *self._shard(jnp.shape(x))) if self._is_cut(x) else self.rows

        return jax.tree.map(one, params)

    def _shard(self, shape: tuple[int, ...]) -> PartitionSpec:
        here = self.dimension(shape)
        return PartitionSpec() if here is None else PartitionSpec(*[None] * here, self.axes)

    def _is_cut(self, x: Any) -> bool:
        return self.shard_params and self.dimension(jnp.shape(x)) is not None

    def on_mesh(self, specs: Any) -> Any:
        """Specifications as shardings."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)

    def put(self, tree: Any, specs: Any) -> Any:
        """Leaves where their specifications say; in several processes, each has the same ones."""
        return jax.device_put(tree, self.on_mesh(specs))

    def put_params(self, params: Any) -> Any:
        """Parameters where they belong."""
        return self.put(params, self.params(params))

    def put_shards(self, tree: Any) -> Any:
        """Leaves of an optimizer's state where they belong."""
        return self.put(tree, self.shards(tree))

    def copied(self, params: Any) -> Any:
        """Copies of parameters, where they belong."""

        def one(x: Any) -> Any:
            stays = isinstance(x, Array) and not (self.has_others and x.is_fully_addressable)
            return jnp.copy(x) if stays else np.array(x)

        return self.put_params(jax.tree.map(one, params))

    def put_rows(self, tree: Any) -> Any:
        """Examples over the devices. In several processes, each has those of its own devices."""
        sharding = NamedSharding(self.mesh, self.rows)

        def one(x: Any) -> Array:
            if not self.has_others:
                return jax.device_put(x, sharding)
            if isinstance(x, Array) and not x.is_fully_addressable:
                return x
            return jax.make_array_from_process_local_data(sharding, np.asarray(x))

        return jax.tree.map(one, tree)

    def own_rows(self, size: int) -> np.ndarray:
        """Which of so many rows belong to this process's devices, in their order."""
        sharding = NamedSharding(self.mesh, self.rows)
        parts = sharding.addressable_devices_indices_map((size,)).values()
        return np.concatenate(sorted((np.arange(size)[part] for part in parts), key=lambda rows: rows[0]))

    def zeros(self, params: Any) -> Any:
        """The sum of nothing, not complete."""

        def one(x: Any, sharding: NamedSharding) -> Array:
            parts = 1 if self._is_cut(x) else self.devices
            zeros = jnp.zeros((parts, *x.shape), accumulated(x.dtype))
            return lax.with_sharding_constraint(zeros, sharding)

        return jax.tree.map(one, params, self.on_mesh(self.incomplete(params)))

    def over_devices(self, local: Callable, inputs: Any, outputs: Any) -> Callable:
        """``local`` as each device runs it by itself, on its own part of the arguments.

        Types are not checked for what differs between devices: derivatives with respect to what is the same
        on all of them would be added up over them, before any example is clipped.
        """
        return jax.shard_map(local, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

    def whole(self, params: Any, shapes: Any) -> Any:
        """On each device: parameters put together from their shards."""

        def one(x: Array, shape: Any) -> Array:
            if not self._is_cut(shape):
                return x
            return lax.all_gather(x, self.axes, axis=self.dimension(shape.shape), tiled=True)

        return jax.tree.map(one, params, shapes)

    def part(self, sums: Any) -> Any:
        """On each device: its sums of whole parameters, as sums that are not complete."""
        return jax.tree.map(lambda x: (self._scattered(x) if self._is_cut(x) else x)[None], sums)

    def complete(self, sums: Any) -> Any:
        """Sums that are not complete, added up: each parameter is reduced once."""

        def one(x: Array, spec: PartitionSpec) -> Array:
            return x[0] if spec[0] is None else self._scattered(x[0])

        given = jax.tree.map(lambda x: self._incomplete_as_it_is(x), sums)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), sums)
        added = self.over_devices(lambda s: jax.tree.map(one, s, given), (given,), self.shards(shapes))
        return added(sums)

    def _incomplete_as_it_is(self, x: Any) -> PartitionSpec:
        shape = jnp.shape(x)
        return self.rows if shape[0] > 1 else PartitionSpec(None, *self._shard(shape[1:]))

    def _scattered(self, x: Array) -> Array:
        """On each device: its shard of the sum over devices, or the whole of it where there is none."""
        here = self.dimension(x.shape)
        if here is None:
            return lax.psum(x, self.axes)
        return lax.psum_scatter(x, self.axes, scatter_dimension=here, tiled=True)

    def local_rows(self, size: int) -> int:
        """Those of each device, of so many in all.

        Raises:
            ValueError: they cannot be divided.
        """
        if size % self.devices:
            raise ValueError(
                f"a physical batch of {size} rows cannot be divided among {self.devices} devices: its size "
                "must be a multiple of their number."
            )
        return size // self.devices
