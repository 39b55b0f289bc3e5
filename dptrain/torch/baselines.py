"""Methods that need no capture: one example at a time, ``vmap`` of a gradient, and no privacy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dptrain.core.methods import Capture, Method

from .bookkeeping import clip_factors, total_of
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


def run(method: Method, model, loss_fn, parameters, batch, mask, batch_size, clip_norm, grid=None) -> Result:
    """Dispatch; all return sums over the examples in ``mask``, on the grid if there is one."""
    if method.capture is Capture.LOOP:
        return one_by_one(model, loss_fn, parameters, batch, mask, batch_size, clip_norm, grid)
    if method.capture is Capture.VMAP:
        return vectorised(model, loss_fn, parameters, batch, mask, batch_size, clip_norm, grid)
    return non_private(model, loss_fn, parameters, batch, mask, batch_size)


def _rows(batch: Any, start: int, stop: int) -> Any:
    return tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) else t, batch)


def one_by_one(model, loss_fn, parameters, batch, mask, batch_size, clip_norm, grid=None) -> Result:
    """Physical batches of one: memory of a single gradient, and correct for any model."""
    leaves = list(parameters.values())
    on_grid = None if grid is None else GridSums(parameters, clip_norm, grid)
    total = {n: torch.zeros_like(widen(p.detach())) for n, p in parameters.items()} if grid is None else {}
    norms, losses = [], []
    for b in range(batch_size):
        with torch.enable_grad(), refusing(NOT_ALONE):
            loss = loss_fn(model, _rows(batch, b, b + 1))
        check_losses(loss, 1)
        found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        grads = {name: g.unsqueeze(0) for name, g in zip(parameters, found) if g is not None}
        squared = _squared_norms(grads, 1, loss)
        here = torch.as_tensor(mask is None or bool(mask[b]), device=loss.device)
        use = here & squared.isfinite() & loss.isfinite().all()
        if on_grid is not None:
            on_grid.add(grads, _factors(squared, on_grid.aim, leaves), use)
        elif bool(use):
            factor = _factors(squared, clip_norm, leaves).squeeze(0)
            for name, g in grads.items():
                total[name].add_(widen(g.squeeze(0)) * factor)
        norms.append(squared.sqrt().squeeze(0))
        losses.append(loss.detach().squeeze(0))
    sums = total if on_grid is None else on_grid.sums
    return sums, *_masked(torch.stack(norms), torch.stack(losses), mask)


def _squared_norms(gradients: dict[str, Tensor], batch_size: int, loss: Tensor) -> Tensor:
    """``[B]`` over all parameters, of ``[B, *parameter]`` each."""
    parts = [squared_norm(g) for g in gradients.values()]
    return total_of(parts) if parts else torch.zeros(batch_size, device=loss.device)


def _factors(squared: Tensor, clip_norm: float, leaves: list[Tensor]) -> Tensor:
    return clip_factors(squared, clip_norm, sum(p.numel() for p in leaves), len(leaves))


def vectorised(model, loss_fn, parameters, batch, mask, batch_size, clip_norm, grid=None) -> Result:
    """``vmap(grad)`` of the loss of one example, as functorch users write it."""
    wrapper = _Loss(model, loss_fn)
    frozen = {f"model.{n}": p.detach() for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {f"model.{n}": b for n, b in model.named_buffers()}
    mine = {f"model.{n}": p.detach() for n, p in parameters.items()}

    def one(values, example):
        batch_of_one = tree_map(lambda t: t.unsqueeze(0) if isinstance(t, Tensor) else t, example)
        out = torch.func.functional_call(wrapper, (values, frozen, buffers), (batch_of_one,))
        check_losses(out, 1)
        return out.squeeze(0), out.squeeze(0)

    transform = torch.func.vmap(torch.func.grad(one, has_aux=True), in_dims=(None, 0), randomness="different")
    with refusing(NO_VMAP), torch.no_grad():  # for a batch that asks for gradients of its own
        grads, losses = transform(mine, batch)
    with full_precision(losses.device):
        grads = {name.removeprefix("model."): g for name, g in grads.items()}
        return _clipped(parameters, grads, losses, mask, batch_size, clip_norm, grid)


def _clipped(parameters, grads, losses, mask, batch_size, clip_norm, grid) -> Result:
    squared = _squared_norms(grads, batch_size, losses)
    included = squared.isfinite() & losses.isfinite()
    if mask is not None:
        included = included & mask
    leaves = list(parameters.values())
    if grid is not None:
        on_grid = GridSums(parameters, clip_norm, grid)
        on_grid.add(grads, _factors(squared, on_grid.aim, leaves), included)
        return on_grid.sums, *_masked(squared.sqrt(), losses.detach(), mask)
    factors = torch.where(included, _factors(squared, clip_norm, leaves), 0.0)
    sums = {}
    for name, g in grads.items():
        keep = included.reshape(-1, *[1] * (g.dim() - 1))
        sums[name] = weighted_sum(torch.where(keep, widen(g), 0.0), factors)
    return sums, *_masked(squared.sqrt(), losses.detach(), mask)


class _Loss(nn.Module):
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
