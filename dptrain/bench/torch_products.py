"""Ordinary training whose linear maps are multiplied as dptrain's are: what that choice gives both.

Nobody trains like this without dptrain. It is the fairest baseline there is, so it takes part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from dptrain.torch import products


class _Linear(Function):
    """``x W^T + b`` and its ordinary gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        rows, cols = g.flatten(0, -2), x.flatten(0, -2)
        return (
            products.product(g, weight) if ctx.needs_input_grad[0] else None,
            products.add_product(None, rows, cols) if ctx.needs_input_grad[1] else None,
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


class SameProducts(TorchFunctionMode):
    """Within, ``F.linear`` and ``torch.addmm`` with a bias are done by `dptrain.torch.products`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        if func is torch.addmm and not kwargs and args[0].dim() == 1:
            bias, x, weight = args
            return _Linear.apply(x, weight.mT, bias)
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(input, weight, bias)
