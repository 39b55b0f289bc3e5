"""Logical batches in physical ones: a buffer on the device, or a stream from the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .clipped_sum import ClippedSum, PartialSum
from .clipping import ClippedGrad
from .uses import accumulated


def accumulate(
    clipped: ClippedGrad, params: Any, batch: Any, mask: Array, *, physical_batch_size: int
) -> ClippedSum:
    """The clipped sum of a buffer that holds a logical batch, a physical batch at a time.

    A pure function of fixed shapes: one compilation serves every logical batch that fits the buffer, and the
    parts without a real example are skipped. What does not fit goes into a second buffer, whose sum
    is added: nothing is ever cut off. On a mesh each device goes through its own part of the buffer, and
    parameters and sums travel once.

    Args:
        clipped: of ``loss_fn(params, example)``.
        batch: leaves ``[N, ...]``, N a multiple of the physical batch size.
        mask: bool ``[N]``.
        physical_batch_size: examples computed at once, on all devices together.

    Returns:
        The sum; norms and losses are ``[N]``. ``aux`` is left out.

    Raises:
        ValueError: N is no multiple of the physical batch size, or that none of the number of devices.
    """
    batch, mask = jax.tree.map(jnp.asarray, (batch, mask))
    size, rows = len(mask), physical_batch_size
    if rows < 1 or size % rows:
        raise ValueError(
            f"the buffer holds {size} examples, which is no multiple of the physical batch size, {rows}."
        )
    if (spread := clipped.on_mesh) is None:
        return _in_turns(lambda *args, mask: clipped(*args, mask=mask), params, batch, mask, rows)
    own = spread.placement.local_rows(rows)
    way = spread.way((params, jax.tree.map(lambda x: x[:rows], batch)))

    def local(args: tuple, mask: Array, thresholds: Array) -> ClippedSum:
        return _in_turns(lambda *args, mask: clipped.local(args, mask, thresholds, way), *args, mask, own)

    return spread.completed(spread.over_devices(local, (params, batch), mask, clipped.thresholds))


def _zeros(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros(p.shape, accumulated(p.dtype)), params)


def _in_turns(clip: Callable, params: Any, batch: Any, mask: Array, rows: int) -> ClippedSum:
    size = len(mask)
    parts = jax.tree.map(lambda x: x.reshape(size // rows, rows, *x.shape[1:]), (batch, mask))
    live = jnp.any(parts[1], 1)
    order = jnp.argsort(~live, stable=True)  # those with real examples first

    def turn(i: Array, total: tuple) -> tuple:
        grads, norms, losses = total
        here = order[i]
        part, part_mask = jax.tree.map(lambda x: x[here], parts)
        out = clip(params, part, mask=part_mask)
        grads = jax.tree.map(jnp.add, grads, out.grads)
        return grads, norms.at[here].set(out.norms), losses.at[here].set(out.losses)

    part = jax.tree.map(lambda x: x[0], parts)
    like = jax.eval_shape(lambda: clip(params, part[0], mask=part[1]))
    nothing = [jnp.zeros((size // rows, *x.shape), x.dtype) for x in (like.norms, like.losses)]
    start = (jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), like.grads), *nothing)
    grads, norms, losses = lax.fori_loop(0, jnp.sum(live), turn, start)
    return ClippedSum(grads, norms.reshape(size), losses.reshape(size), None, like.clip_norm)


class Accumulator:
    """The sum of a logical batch whose physical batches come from the host, compiled once.

    Holds one set of gradients, which every batch is added to in place; a sum carries the clip norm that it
    was begun with. On a mesh each device holds its own, and they are added up once, by ``finish``; with
    ``shard_params`` each holds a shard, to which the gradients of all devices are added after each physical
    batch.
    """

    def __init__(self, clipped: ClippedGrad):
        self.clipped = clipped
        spread = clipped.on_mesh

        def add(total: Any, args: tuple, mask: Array, thresholds: Array) -> PartialSum:
            clip = clipped.local if spread is None else spread.partial
            out = clip(args, mask, thresholds)
            return PartialSum(jax.tree.map(jnp.add, total, out.grads), out.norms, out.losses, out.aux)

        self._add = jax.jit(add, donate_argnums=0)
        self._finish = None if spread is None else jax.jit(spread.placement.complete, donate_argnums=0)
        zeros = _zeros if spread is None else spread.placement.zeros
        self._zeros = jax.jit(lambda params: zeros(params))

    def __call__(self, params: Any, batches: Iterable[tuple[Any, Any]]) -> ClippedSum:
        """The clipped sum of ``(batch, mask)`` pairs, all of one shape; norms and losses are not kept."""
        total = self.zeros(params)
        for batch, mask in batches:
            total = self.add(total, params, batch, mask=mask)
        return self.finish(total)

    def zeros(self, params: Any) -> PartialSum:
        """The sum of no examples."""
        spread, none = self.clipped.on_mesh, jnp.zeros(0)
        grads = self._zeros(params if spread is None else spread.placement.put_params(params))
        return PartialSum(grads, none, none, None, self.clipped.bound)

    def add(self, total: PartialSum, *args: Any, mask: Any) -> PartialSum:
        """The sum of ``total`` and a physical batch, with the norms and losses of the batch.

        Args:
            total: of ``zeros`` or ``add``; its buffers are taken.
            args, mask: as ``ClippedGrad`` takes them.

        Raises:
            TypeError: anything else.
            ValueError: the clip norm has changed since ``zeros``.
        """
        if _checked(total).clip_norm != self.clipped.bound:
            raise ValueError(
                "the clip norm has changed within a logical batch: set it before the first physical batch "
                "of one."
            )
        out = self._add(total.grads, *self.clipped.checked(args, mask), self.clipped.thresholds)
        return replace(out, clip_norm=self.clipped.bound)

    def finish(self, total: PartialSum) -> ClippedSum:
        """The sum of a logical batch.

        Args:
            total: of the last ``add``; its buffers are taken.

        Raises:
            TypeError: anything else.
        """
        none, grads = jnp.zeros(0), _checked(total).grads
        if self._finish is not None:
            grads = self._finish(grads)
        return ClippedSum(grads, none, none, None, total.clip_norm)

    @property
    def compilations(self) -> int:
        """How often a physical step has been compiled."""
        return self._add._cache_size()


def _checked(total: PartialSum) -> PartialSum:
    if not isinstance(total, PartialSum):
        raise TypeError(f"a sum is begun by zeros, and this is a {type(total).__name__}.")
    return total
