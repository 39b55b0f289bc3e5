"""Methods that need no capture: one example at a time, ``vmap`` of a gradient, and no privacy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dptrain.core.methods import Capture, Method

from .bookkeeping import clip_factors
from .clipped_sum import owned
from .errors import Refused, is_final
from .full_precision import full_precision
from .guards import check_losses
from .uses.base import weighted_sum, widen

Result = tuple[dict[str, Tensor], Tensor, Tensor]  # grads, norms [B], losses [B]


def run(method: Method, model, loss_fn, parameters, batch, mask, batch_size, clip_norm) -> Result:
    """Dispatch; all return sums over the examples in ``mask``."""
    if method.capture is Capture.LOOP:
        return one_by_one(model, loss_fn, parameters, batch, mask, batch_size, clip_norm)
    if method.capture is Capture.VMAP:
        return vectorised(model, loss_fn, parameters, batch, mask, batch_size, clip_norm)
    return non_private(model, loss_fn, parameters, batch, mask, batch_size)


def _rows(batch: Any, start: int, stop: int) -> Any:
    return tree_map(lambda t: t[start:stop] if isinstance(t, Tensor) else t, batch)


def one_by_one(model, loss_fn, parameters, batch, mask, batch_size, clip_norm) -> Result:
    """Physical batches of one: memory of a single gradient, and correct for any model."""
    leaves = list(parameters.values())
    total = [torch.zeros_like(widen(p.detach())) for p in leaves]
    norms, losses = [], []
    for b in range(batch_size):
        with torch.enable_grad():
            loss = loss_fn(model, _rows(batch, b, b + 1))
        check_losses(loss, 1)
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        squared = sum(widen(g).square().sum() for g in grads if g is not None)
        squared = torch.as_tensor(squared, device=loss.device)
        factor = clip_factors(squared, clip_norm)
        use = (mask is None or bool(mask[b])) and bool(squared.isfinite() & loss.isfinite().all())
        if use:
            for t, g in zip(total, grads):
                if g is not None:
                    t.add_(widen(g) * factor)
        norms.append(squared.sqrt())
        losses.append(loss.detach().squeeze(0))
    return dict(zip(parameters, total)), *_masked(torch.stack(norms), torch.stack(losses), mask)


def vectorised(model, loss_fn, parameters, batch, mask, batch_size, clip_norm) -> Result:
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

    try:
        transform = torch.func.vmap(
            torch.func.grad(one, has_aux=True), in_dims=(None, 0), randomness="different"
        )
        grads, losses = transform(mine, batch)
    except Exception as error:
        if is_final(error):
            raise
        raise Refused(
            f"per-example-vmap cannot transform this model ({error}): use method='auto'."
        ) from error
    with full_precision(losses.device):
        return _clipped(parameters, grads, losses, mask, batch_size, clip_norm)


def _clipped(parameters, grads, losses, mask, batch_size, clip_norm) -> Result:
    squared = sum(widen(g).reshape(batch_size, -1).square().sum(1) for g in grads.values())
    included = squared.isfinite() & losses.isfinite()
    if mask is not None:
        included = included & mask
    factors = torch.where(included, clip_factors(squared, clip_norm), 0.0)
    sums = {}
    for name, g in grads.items():
        keep = included.reshape(-1, *[1] * (g.dim() - 1))
        sums[name.removeprefix("model.")] = weighted_sum(torch.where(keep, widen(g), 0.0), factors)
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
