"""The judge: clipped gradients one example at a time, in float64, by ordinary autograd."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def clipped_sum(
    model: nn.Module, loss_fn, batch, clip_norm: float, keep=None
) -> tuple[dict[str, Tensor], Tensor]:
    """(sum of clipped gradients by name, norms ``[B]``) over the examples in ``keep``."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    size = len(torch.utils._pytree.tree_leaves(batch)[0])
    norms = torch.zeros(size, dtype=torch.float64)
    for b in range(size):
        if keep is not None and not keep[b]:
            continue
        loss = loss_fn(model, tree_map(lambda t, b=b: t[b : b + 1], batch)).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        norms[b] = sum(g.square().sum() for g in grads if g is not None).sqrt()
        if not norms[b].isfinite():
            continue
        factor = min(1.0, clip_norm / float(norms[b]))
        for name, g in zip(parameters, grads):
            if g is not None:
                total[name] += factor * g
    return total, norms


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest error of any parameter's sum, relative to the norm of the whole sum's scale."""
    worst = 0.0
    for name, want in expected.items():
        scale = max(float(want.norm()), 1e-3)
        worst = max(worst, float((found[name] - want).norm()) / scale)
    return worst
