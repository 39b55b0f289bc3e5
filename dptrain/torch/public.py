"""Gradients of public examples, of which projections are made. Never to be called with private ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .baselines import per_example
from .guards import trainable
from .subspace import LossFn

NO_VMAP = (
    "torch.func.vmap, which takes the gradients of single public examples, cannot transform this model ({}): "
    "use a mask of their mean gradient (public-topk)."
)


def mean_gradient(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> dict[str, Tensor]:
    """The ordinary gradient of the mean loss over all batches, by name of the trainable parameters.

    Args:
        loss_fn: ``loss_fn(model, batch) -> [B]``.
        batches: of public examples.

    Raises:
        ValueError: there is no batch.
    """
    parameters = trainable(model)
    total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
    size = 0
    for batch in batches:
        with torch.enable_grad():
            losses = loss_fn(model, batch)
        found = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        for own, more in zip(total.values(), found, strict=True):
            if more is not None:
                own += more
        size += len(losses)
    if not size:
        raise ValueError("there are no public examples to take a gradient of.")
    return {name: own / size for name, own in total.items()}


def single_gradients(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> dict[str, Tensor]:
    """The gradient of each public example by itself, ``[n, *parameter]`` by name.

    Raises:
        Refused: ``torch.func.vmap`` cannot transform the model.
        ValueError: there is no batch.
    """
    parameters = trainable(model)
    parts = [
        per_example(model, loss_fn, parameters, batch, NO_VMAP)[0] for batch in batches if tree_leaves(batch)
    ]
    if not parts:
        raise ValueError("there are no public examples to take gradients of.")
    return {name: torch.cat([part[name] for part in parts]).detach() for name in parameters}
