"""A physical batch on a mesh: each device clips its own rows, and the sums are added up when it is time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from .clipped_sum import ClippedSum, PartialSum
from .hosts import Processes
from .placement import Placement

if TYPE_CHECKING:
    from .clipping import ClippedGrad


class OnMesh:
    """A clipped gradient on the devices of a mesh."""

    def __init__(self, clipped: ClippedGrad, placement: Placement):
        self.clipped, self.placement = clipped, placement
        self._agreed: dict[str, str] = {}

    def placed(self, args: tuple, mask: Any, size: int) -> tuple[tuple, Any, int]:
        """The arguments and the mask where they belong, and the number of rows on all devices.

        Args:
            args: in several processes, rows are those of the process's own devices, or arrays over all.
            size: of the batch as it was given.
        """
        place = self.placement
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, mask))):
            return args, mask, place.devices * place.local_rows(size)
        batch = [args[i] for i in self.clipped.batched]
        is_own = place.has_others and all(
            getattr(x, "is_fully_addressable", True) for x in jax.tree.leaves(batch)
        )
        if is_own:
            size *= jax.process_count()
        place.local_rows(size)
        if mask is None:
            mask = np.ones(len(place.own_rows(size)), bool)
        specs = self._inputs(args)
        args = tuple(
            place.put_rows(x) if i in self.clipped.batched else place.put(x, specs[i])
            for i, x in enumerate(args)
        )
        if place.has_others and (name := repr(self.shapes(args))) not in self._agreed:
            self._agreed[name] = Processes().tell(self.clipped.way(self.shapes(args)))
        return args, place.put_rows(mask), size

    def clip(self, args: tuple, mask: Array, thresholds: Array) -> ClippedSum:
        """The sum of a physical batch, complete."""
        return self.completed(self.partial(args, mask, thresholds))

    def completed(self, out: PartialSum) -> ClippedSum:
        """Added up over the devices."""
        grads = self.placement.complete(out.grads)
        return ClippedSum(grads, out.norms, out.losses, out.aux, self.clipped.bound)

    def partial(self, args: tuple, mask: Array, thresholds: Array) -> PartialSum:
        """The sum of a physical batch, which the devices have yet to add up."""
        way = self.way(args)

        def local(args: tuple, mask: Array, thresholds: Array) -> ClippedSum:
            return self.clipped.local(args, mask, thresholds, way)

        return self.over_devices(local, args, mask, thresholds)

    def over_devices(self, local: Callable, args: tuple, mask: Array, thresholds: Array) -> PartialSum:
        """``local(args, mask, thresholds) -> ClippedSum`` by each device on its rows and whole parameters."""
        place, number = self.placement, self.clipped.argnums
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), args[number])

        def body(args: tuple, mask: Array, thresholds: Array) -> PartialSum:
            params = place.whole(args[number], shapes)
            out = local((*args[:number], params, *args[number + 1 :]), mask, thresholds)
            return PartialSum(place.part(out.grads), out.norms, out.losses, out.aux)

        rows = place.rows
        outputs = PartialSum(place.incomplete(shapes), rows, rows, rows)  # type: ignore[arg-type]
        inputs = self._inputs(args), rows, PartitionSpec()
        return place.over_devices(body, inputs, outputs)(args, mask, thresholds)

    def shapes(self, args: tuple) -> tuple:
        """Those of what each device has: its rows, and whole parameters."""

        def one(x: Any, is_batch: bool) -> jax.ShapeDtypeStruct:
            shape = jnp.shape(x)
            if is_batch:
                shape = (self.placement.local_rows(shape[0]), *shape[1:])
            return jax.ShapeDtypeStruct(shape, jnp.result_type(x))

        return tuple(
            jax.tree.map(lambda x: one(x, i in self.clipped.batched), arg)  # noqa: B023
            for i, arg in enumerate(args)
        )

    def _inputs(self, args: tuple) -> tuple:
        place = self.placement

        def one(i: int, arg: Any) -> Any:
            if i == self.clipped.argnums:
                return place.params(arg)
            return jax.tree.map(lambda _: place.rows if i in self.clipped.batched else PartitionSpec(), arg)

        return tuple(one(i, arg) for i, arg in enumerate(args))

    def way(self, args: tuple) -> str:
        """What is fastest. Each process may find another way so, but all must run the same program: they take
        what they have agreed upon, if they were asked before the step was traced."""
        shapes = self.shapes(args)
        return (
            self._agreed.get(repr(shapes), "whole") if self.placement.has_others else self.clipped.way(shapes)
        )
