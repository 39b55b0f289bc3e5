"""Methods that capture nothing, on a model under FSDP2: ordinary gradients, and those of single examples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import baselines
from .errors import Refused
from .guards import check_losses
from .sharded_sums import Shards, Trouble
from .uses.base import widen

if TYPE_CHECKING:
    from .clipping import ClippedGrad

#: norms and losses ``[B]``
Result = tuple[Tensor, Tensor]


def one_by_one(whole: ClippedGrad, shards: Shards, rows: Any, mask: Tensor | None, batch_size: int) -> Result:
    """By a method that differentiates examples: the whole model is gathered for the duration of the batch."""
    sharding = shards.sharding
    trouble = Trouble(sharding)
    method, model, loss_fn, rule = whole.method, whole.model, whole.loss_fn, whole.rule
    nothing = sharding.zeros(next(iter(sharding.shards))).new_zeros(batch_size)
    sums, norms, losses = {}, nothing, nothing
    with sharding.as_one() as full, trouble:
        if mask is None or bool(mask.any()):
            sums, norms, losses = baselines.run(method, model, loss_fn, full, rows, mask, batch_size, rule)
    trouble.share("")
    for unit in sharding.units:
        shards.reduce(unit, sums)
    return norms, losses


def non_private(
    whole: ClippedGrad, shards: Shards, rows: Any, mask: Tensor | None, batch_size: int
) -> Result:
    """The ordinary gradient of the summed loss, unit after unit as the backward pass comes to them."""
    sharding = shards.sharding
    trouble = Trouble(sharding)
    with torch.enable_grad():
        losses = whole.loss_fn(whole.model, rows)
    with trouble:
        check_losses(losses, batch_size)
    trouble.share("")
    total = losses.sum() if mask is None else torch.where(mask, losses, 0.0).sum()
    due = [unit for unit in reversed(sharding.units) if unit.names]  # the root comes first, and ends last
    waiting: dict[str, Tensor] = {}

    def take(name: str, gradient: Tensor) -> None:
        waiting[name] = widen(gradient)
        while due and all(n in waiting for n in due[0].names):
            shards.reduce(due.pop(0), waiting)

    if not total.requires_grad:
        raise Refused("the losses depend on no trainable parameter of the model that was passed.")
    sharding.differentiate(total, take)
    while due:
        shards.reduce(due.pop(0), waiting)
    keep = torch.ones(batch_size, dtype=torch.bool, device=total.device) if mask is None else mask
    values = losses.detach()
    unknown = torch.full_like(widen(values), float("nan"))
    return torch.where(keep, unknown, 0.0), torch.where(keep, values, 0.0)
