"""A sum of clipped gradients: bounded, not yet private."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .reduction import Reduction


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped per-example gradients: bounded, but not private until noise is added.

    Attributes:
        grads: by parameter name, the sum over examples of clipped gradients, shaped like the
            parameter, in float32 or better; on a grid, in int64 and units of its spacing.
        norms: ``[B]``, per-example norms before clipping, 0 where masked. Unprotected.
        losses: ``[B]``, per-example losses, 0 where masked. Unprotected.
        clip_norm: C, the bound on each example's part; infinite for the non-private method.
        grid: the spacing of the integer grid of hardened steps; None for ordinary ones.
        reduction: of one rank's sum: how it is added to those of the others, by ``privatize``.
    """

    grads: dict[str, Tensor]
    norms: Tensor
    losses: Tensor
    clip_norm: float
    grid: float | None = None
    reduction: Reduction | None = field(default=None, repr=False)

    def _is_like(self, other: ClippedSum) -> bool:
        alike = (self.clip_norm, self.grid) == (other.clip_norm, other.grid)
        return alike and self.grads.keys() == other.grads.keys()

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """Accumulate physical batches. Only sums of the same parameters, clip norm and grid add."""
        if not isinstance(other, ClippedSum):
            return NotImplemented
        if not self._is_like(other):
            raise ValueError(
                "these clipped sums have different clip norms, grids or parameters: accumulate only "
                "batches of one logical step."
            )
        grads = {name: g + other.grads[name] for name, g in self.grads.items()}
        total = replace(self, grads=grads, reduction=self.reduction or other.reduction)
        return total.extended(other.norms, other.losses)

    def add_(self, other: ClippedSum) -> ClippedSum:
        """Accumulate in place: the buffers of ``self`` are reused and returned."""
        if not self._is_like(other):
            return self + other
        mine = list(self.grads.values())
        if mine:
            torch._foreach_add_(mine, [other.grads[name] for name in self.grads])
        return self.extended(other.norms, other.losses)

    def extended(self, norms: Tensor, losses: Tensor) -> ClippedSum:
        """The same buffers, to which further examples have been added."""
        return replace(self, norms=torch.cat([self.norms, norms]), losses=torch.cat([self.losses, losses]))

    def spoil(self) -> None:
        """Make sure that nobody releases a sum that was only partly written."""
        self.grads.clear()


def owned(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, each in memory of its own: what is added in place to one is added once, and to no other.

    Autograd hands the gradient of ``w + v`` on to both as one tensor, and that of a sum expanded.
    """
    users = Counter(g.untyped_storage().data_ptr() for g in grads.values())
    return {
        name: g.clone() if users[g.untyped_storage().data_ptr()] > 1 or _overlaps(g) else g
        for name, g in grads.items()
    }


def _overlaps(tensor: Tensor) -> bool:
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape))
