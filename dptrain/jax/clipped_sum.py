"""A sum of clipped gradients: bounded, not yet private."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped per-example gradients: bounded, but not private until noise is added.

    A pytree, so it passes through ``jax.jit``, ``lax.scan`` and donation.

    Attributes:
        grads: like the parameters, the sum over examples of clipped gradients, in float32 or better.
        norms: ``[B]``, per-example norms before clipping, 0 where masked. Unprotected.
        losses: ``[B]``, per-example losses, 0 where masked. Unprotected.
        aux: what the loss function returned besides, examples leading; None without ``has_aux``.
            Unprotected.
        clip_norm: C, the bound on each example's part; infinite for the non-private method.
    """

    grads: Any
    norms: Array
    losses: Array
    aux: Any = None
    clip_norm: float = dataclasses.field(default=float("inf"), metadata={"static": True})

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """Accumulate physical batches. Only sums of the same parameters and clip norm add.

        Raises:
            ValueError: they differ.
        """
        if not isinstance(other, ClippedSum):
            return NotImplemented
        if self.clip_norm != other.clip_norm or jax.tree.structure(self.grads) != jax.tree.structure(
            other.grads
        ):
            raise ValueError(
                "these clipped sums have different clip norms or parameters: accumulate only "
                "batches of one logical step."
            )
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), self._rows(), other._rows())
        norms, losses, aux = both
        return ClippedSum(jax.tree.map(jnp.add, self.grads, other.grads), norms, losses, aux, self.clip_norm)

    def _rows(self) -> tuple:
        return self.norms, self.losses, self.aux


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartialSum:
    """A part of a logical batch's clipped sum, which ``Accumulator.finish`` makes a ``ClippedSum`` of.

    Attributes:
        grads: like the parameters; on a mesh with a leading axis over which they are yet to be added.
        norms, losses, aux: as of a ``ClippedSum``, of the physical batch that was added last.
        clip_norm: C, the bound on each example's part.
    """

    grads: Any
    norms: Array
    losses: Array
    aux: Any = None
    clip_norm: float = dataclasses.field(default=float("inf"), metadata={"static": True})
