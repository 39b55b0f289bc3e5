"""Public subspaces before clipping: each example's gradient is projected, and only then clipped.

For a public orthogonal projection Pi of each parameter, ``Restricted`` makes of a loss the same loss of

    W_eff = W' + Pi(W - W'),    W' = W without a gradient,

whose value is W and whose gradient comes back as Pi g (Pi is its own transpose). So ``clipped_grad``, by any
method, takes the norm of Pi g and sums clip(Pi g): clipping spends nothing on what is thrown away. After the
noise, ``projected`` (``dptrain/optim/compression.py``) applies Pi to the private gradient once more, which
leaves noise within the subspace alone.

Why this costs what DP-SGD costs. Given the weights, Pi does not depend on a private example: it is a function
of public examples, of a key, and of weights that have been released. The restricted loss is then one loss
function among others, and its step is the subsampled Gaussian mechanism with sensitivity C, whatever Pi is
and however it changes from step to step (adaptive composition). The second projection is post-processing. In
law it is the mechanism that adds N(0, (sigma C)^2) in coordinates of the subspace only: an orthogonal
projection of spherical noise is spherical noise in the subspace.

With a basis from public gradients (``projections.principal``) this is the embedding part of GEP (Yu et al.
2021, arXiv 2102.12677). Its residual part, the gradients outside of the subspace clipped and noised on their
own, is a second release with a second clip norm; it is not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .baselines import WithLoss
from .errors import Refused
from .fsdp import fsdp_modules
from .projections import Projection

LossFn = Callable[[nn.Module, Any], Tensor]


class Restricted:
    """A loss function, ``(model, batch) -> [B]``, whose gradients lie in a public subspace.

    Attributes:
        loss_fn: what it restricts.
        projections: by parameter name; may be exchanged from step to step for others of the same kinds. The
            engine need not plan again: which operations there are, and their shapes, stay the same. The
            physical batches of a logical one must be clipped with the same.

    A parameter that has no projection keeps its whole gradient. Before the first step, give each parameter
    the kind and size of projection that it will have: ``projections.whole`` or ``first_axes``, for want of
    another.
    """

    def __init__(self, loss_fn: LossFn, projections: Mapping[str, Projection]) -> None:
        self.loss_fn, self.projections = loss_fn, dict(projections)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """
        Raises:
            Refused: there is a projection of a parameter that the model does not have, or FSDP shards it.
        """
        if fsdp_modules(model):
            raise Refused("public subspaces are for models that are whole on each rank, not under FSDP.")
        own = dict(model.named_parameters())
        if unknown := sorted(self.projections.keys() - own.keys()):
            raise Refused(f"there is a projection of {unknown[0]}, which is no parameter of the model.")
        values = {f"model.{name}": p.attached(own[name]) for name, p in self.projections.items()}
        return torch.func.functional_call(WithLoss(model, self.loss_fn), values, (batch,))
