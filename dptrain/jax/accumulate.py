"""Logical batches in physical ones: a buffer on the device, or a stream from the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .clipped_sum import ClippedSum
from .clipping import ClippedGrad
from .uses import accumulated


def accumulate(
    clipped: ClippedGrad, params: Any, batch: Any, mask: Array, *, physical_batch_size: int
) -> ClippedSum:
    """The clipped sum of a buffer that holds a logical batch, a physical batch at a time.

    A pure function of fixed shapes: one compilation serves every logical batch that fits the buffer, and the
    parts without a real example are skipped. What does not fit goes into a second buffer, whose sum
    is added: nothing is ever cut off.

    Args:
        clipped: of ``loss_fn(params, example)``.
        batch: leaves ``[N, ...]``, N a multiple of the physical batch size.
        mask: bool ``[N]``.
        physical_batch_size: examples computed at once.

    Returns:
        The sum; norms and losses are ``[N]``. ``aux`` is left out.

    Raises:
        ValueError: N is no multiple of the physical batch size.
    """
    batch, mask = jax.tree.map(jnp.asarray, (batch, mask))
    size, rows = len(mask), physical_batch_size
    if rows < 1 or size % rows:
        raise ValueError(
            f"the buffer holds {size} examples, which is no multiple of the physical batch size, {rows}."
        )
    parts = jax.tree.map(lambda x: x.reshape(size // rows, rows, *x.shape[1:]), (batch, mask))
    live = jnp.any(parts[1], 1)
    order = jnp.argsort(~live, stable=True)  # those with real examples first

    def turn(i: Array, total: tuple) -> tuple:
        grads, norms, losses = total
        here = order[i]
        part, part_mask = jax.tree.map(lambda x: x[here], parts)
        out = clipped(params, part, mask=part_mask)
        grads = jax.tree.map(jnp.add, grads, out.grads)
        return grads, norms.at[here].set(out.norms), losses.at[here].set(out.losses)

    part = jax.tree.map(lambda x: x[0], parts)
    like = jax.eval_shape(lambda: clipped(params, part[0], mask=part[1]))
    nothing = [jnp.zeros((size // rows, *x.shape), x.dtype) for x in (like.norms, like.losses)]
    start = (jax.tree.map(lambda g: jnp.zeros(g.shape, g.dtype), like.grads), *nothing)
    grads, norms, losses = lax.fori_loop(0, jnp.sum(live), turn, start)
    return ClippedSum(grads, norms.reshape(size), losses.reshape(size), None, like.clip_norm)


class Accumulator:
    """The sum of a logical batch whose physical batches come from the host, compiled once.

    Holds one set of gradients, which every batch is added to in place.
    """

    def __init__(self, clipped: ClippedGrad):
        self.clipped = clipped

        def add(total: Any, args: tuple, mask: Array) -> ClippedSum:
            out = clipped(*args, mask=mask)
            return replace(out, grads=jax.tree.map(jnp.add, total, out.grads))

        self._add = jax.jit(add, donate_argnums=0)
        self._zeros = jax.jit(
            lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape, accumulated(p.dtype)), params)
        )

    def __call__(self, params: Any, batches: Iterable[tuple[Any, Any]]) -> ClippedSum:
        """The clipped sum of ``(batch, mask)`` pairs, all of one shape; norms and losses are not kept."""
        total = self.zeros(params)
        for batch, mask in batches:
            total = self.add(total, params, batch, mask=mask).grads
        none = jnp.zeros(0)
        return ClippedSum(total, none, none, None, self.clipped.bound)

    def zeros(self, params: Any) -> Any:
        """The sum of no examples."""
        return self._zeros(params)

    def add(self, total: Any, *args: Any, mask: Any) -> ClippedSum:
        """The sum of ``total`` and a physical batch, with the norms and losses of the batch.

        Args:
            total: of ``zeros``, or the gradients of an earlier sum; its buffers are taken.
            args, mask: as ``ClippedGrad`` takes them.
        """
        return self._add(total, args, jnp.asarray(mask))

    @property
    def compilations(self) -> int:
        """How often a physical step has been compiled."""
        return self._add._cache_size()
