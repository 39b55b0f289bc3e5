"""Methods that need no capture: one example at a time, ``vmap`` of a gradient, and no privacy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dptrain.core.clip_rules import ClipRule, Flat
from dptrain.core.methods import Capture, Method

from .bookkeeping import Bookkeeping, factors_by_part, total_of
from .clipped_sum import owned
from .errors import refusing
from .full_precision import full_precision
from .guards import check_losses
from .on_grid import GridSums
from .uses.base import squared_norm, weighted_sum, widen

NOT_ALONE = (
    "the model cannot compute an example by itself, as a batch of one ({}): see that the leading axis of "
    "every tensor counts the examples."
)
NO_VMAP = "per-example-vmap cannot transform this model ({}): use method='auto'."

Result = tuple[dict[str, Tensor], Tensor, Tensor]  # grads, norms [B], losses [B]


def run(method: Method, model, loss_fn, parameters, batch, mask, batch_size, rule, grid=None) -> Result:
    """Dispatch; all return sums over the examples in ``mask``, on the grid if there is one."""
    if method.capture is Capture.LOOP:
        return one_by_one(model, loss_fn, parameters, batch, mask, batch_size, rule, grid)
    if method.capture is Capture.VMAP:
        return vectorised(model, loss_fn, parameters, batch, mask, batch_size, rule, grid)
    return non_private(model, loss_fn, parameters, batch, mask, batch_size)


def _rows(batch: Any, start: int, stop: int) -> Any:
    return tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) else t, batch)


def one_by_one(model, loss_fn, parameters, batch, mask, batch_size, rule: ClipRule, grid=None) -> Result:
    """Physical batches of one: memory of a single gradient, and correct for any model."""
    leaves, parts = list(parameters.values()), _Parts(rule, parameters)
    on_grid = None if grid is None else GridSums(parameters, rule.sensitivity, grid)
    total = {n: torch.zeros_like(widen(p.detach())) for n, p in parameters.items()} if grid is None else {}
    norms, losses = [], []
    for b in range(batch_size):
        with torch.enable_grad(), refusing(NOT_ALONE):
            loss = loss_fn(model, _rows(batch, b, b + 1))
        check_losses(loss, 1)
        found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        grads = {name: g.unsqueeze(0) for name, g in zip(parameters, found) if g is not None}
        by_part = parts.squared_norms(grads, 1, loss)
        squared = Bookkeeping.whole(by_part)
        here = torch.as_tensor(mask is None or bool(mask[b]), device=loss.device)
        use = here & squared.isfinite() & loss.isfinite().all()
        if on_grid is not None:
            (factors,) = parts.factors(by_part, Flat(on_grid.aim))
            on_grid.add(grads, factors, use)
        elif bool(use):
            factors = parts.factors(by_part, rule)
            for name, g in grads.items():
                total[name].add_(widen(g.squeeze(0)) * factors[parts.of[name]].squeeze(0))
        norms.append(squared.sqrt().squeeze(0))
        losses.append(loss.detach().squeeze(0))
    sums = total if on_grid is None else on_grid.sums
    return sums, *_masked(torch.stack(norms), torch.stack(losses), mask)


class _Parts:
    """The parameters by the part of the clip rule that they belong to."""

    def __init__(self, rule: ClipRule, parameters: dict[str, Tensor]):
        self.of = dict(zip(parameters, rule.partition(list(parameters)), strict=True))
        self.count = len(rule.thresholds)
        self.elements, self.tensors = sum(p.numel() for p in parameters.values()), len(parameters)

    def squared_norms(self, gradients: dict[str, Tensor], batch_size: int, loss: Tensor) -> list[Tensor]:
        """``[B]`` over the parameters of each part, of ``[B, *parameter]`` each."""
        found: list[list[Tensor]] = [[] for _ in range(self.count)]
        for name, gradient in gradients.items():
            found[self.of[name]].append(squared_norm(gradient))
        return [total_of(each) if each else torch.zeros(batch_size, device=loss.device) for each in found]

    def factors(self, squared: list[Tensor], rule: ClipRule) -> list[Tensor]:
        return factors_by_part(rule, squared, self.elements, self.tensors)


def vectorised(model, loss_fn, parameters, batch, mask, batch_size, rule: ClipRule, grid=None) -> Result:
    """Clipped from the gradients of single examples, as functorch users write it."""
    grads, losses = per_example(model, loss_fn, parameters, batch)
    with full_precision(losses.device):
        return _clipped(parameters, grads, losses, mask, batch_size, rule, grid)


def per_example(model, loss_fn, parameters, batch, why=NO_VMAP) -> tuple[dict[str, Tensor], Tensor]:
    """``vmap(grad)`` of the loss of one example: gradients by name ``[B, *parameter]``, losses ``[B]``.

    why: says so where that cannot be done.
    """
    wrapper = WithLoss(model, loss_fn)
    frozen = {f"model.{n}": p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {f"model.{n}": b for n, b in model.named_buffers()}
    mine = {f"model.{n}": p.detach() for n, p in parameters.items()}

    def one(values, example):
        batch_of_one = tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, example)
        out = torch.func.functional_call(wrapper, (values, frozen, buffers), (batch_of_one,))
        check_losses(out, 1)
        return out.squeeze(0), out.squeeze(0)

    transform = torch.func.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, 0), randomness="different")
    with refusing(why), torch.no_grad():  # for a batch that asks for gradients of its own
        grads, losses = transform(mine, batch)
    return {name.removeprefix("model."): g for name, g in grads.items()}, losses


def _clipped(parameters, grads, losses, mask, batch_size, rule, grid) -> Result:
    parts = _Parts(rule, parameters)
    by_part = parts.squared_norms(grads, batch_size, losses)
    squared = Bookkeeping.whole(by_part)
    included = squared.isfinite() & losses.isfinite()
    if mask is not None:
        included = included & mask
    if grid is not None:
        on_grid = GridSums(parameters, rule.sensitivity, grid)
        (factors,) = parts.factors(by_part, Flat(on_grid.aim))
        on_grid.add(grads, factors, included)
        return on_grid.sums, *_masked(squared.sqrt(), losses.detach(), mask)
    factors_of = [torch.where(included, each, 0.0) for each in parts.factors(by_part, rule)]
    sums = {}
    for name, g in grads.items():
        keep = included.reshape(-1, *[1] * (g.dim() - 1))
        sums[name] = weighted_sum(torch.where(keep, widen(g), 0.0), factors_of[parts.of[name]])
    return sums, *_masked(squared.sqrt(), losses.detach(), mask)


class WithLoss(nn.Module):
    """A model and its loss as one module, for `torch.func.functional_call`."""

    def __init__(self, model: nn.Module, loss_fn):
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def non_private(model, loss_fn, parameters, batch, mask, batch_size) -> Result:
    """The ordinary gradient of the summed loss: the baseline, without any guarantee."""
    with torch.enable_grad():
        losses = loss_fn(model, batch)
    check_losses(losses, batch_size)
    total = losses.sum() if mask is None else torch.where(mask, losses, 0.0).sum()
    leaves = list(parameters.values())
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    sums = {
        name: torch.zeros_like(widen(p.detach())) if g is None else widen(g)
        for (name, p), g in zip(parameters.items(), grads)
    }
    unknown = torch.full_like(widen(losses.detach()), float("nan"))
    return owned(sums), *_masked(unknown, losses.detach(), mask)


def _masked(norms: Tensor, losses: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if mask is None:
        return norms, losses
    return torch.where(mask, norms, 0.0), torch.where(mask, losses, 0.0)
