"""Autograd functions that compute an operation as usual and tell its uses what they need.

Parameters come in detached; ``anchor`` is an extra input that requires a gradient, so that the
output does too. In the backward pass each function hands the other operand and the gradient of
its output to its uses, and returns the gradient of the data alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from . import products
from .uses.base import is_channels_last

aten = torch.ops.aten
#: of a group, that a kernel for channels last goes through slowly
FEW_CHANNELS = 2


class LinearFunction(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, anchor, weight_use, bias_use):
        ctx.save_for_backward(x if weight_use is not None else None, weight)
        ctx.uses = weight_use, bias_use
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        weight_use, bias_use = ctx.uses
        if weight_use is not None:
            weight_use.arrive(x, g)
        if bias_use is not None:
            bias_use.arrive(None, g)
        return (products.product(g, weight) if ctx.needs_input_grad[0] else None), *[None] * 5


class GroupedLinearFunction(Function):
    """``y[e, t, n] = x[e, t, k] w[e, k, n]``."""

    @staticmethod
    def forward(ctx, x, weight, anchor, use):
        ctx.save_for_backward(x, weight)
        ctx.use = use
        return torch.bmm(x, weight)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        ctx.use.arrive(x, g)
        return (torch.bmm(g, weight.mT) if ctx.needs_input_grad[0] else None), None, None, None


class ConvolutionFunction(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, anchor, options, weight_use, bias_use, with_result):
        y = torch.convolution(x, weight, bias, *options)
        result = None
        if with_result:
            result = y if bias is None else y - bias.reshape(-1, *[1] * (y.dim() - 2))
        ctx.save_for_backward(x, weight, result)
        ctx.options, ctx.uses = options, (weight_use, bias_use)
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, result = ctx.saved_tensors
        weight_use, bias_use = ctx.uses
        if weight_use is not None:
            weight_use.result = result
            weight_use.arrive(x, g)
            weight_use.result = None
        if bias_use is not None:
            bias_use.arrive(None, g.flatten(2).sum(2))
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = _to_images(g, x, weight, *ctx.options)
        return gradient, *[None] * 7


def _to_images(g, x, weight, stride, padding, dilation, transposed, output_padding, groups) -> Tensor:
    """The gradient with respect to the images ``x`` of a convolution."""
    mask = [True, False, False]
    where = tuple(slice(None, None, s) for s in stride)
    pixels = all(k == 1 for k in weight.shape[2:]) and not (transposed or any(padding))
    if not (pixels and any(s > 1 for s in stride) and g.device.type == "cpu" and x.is_contiguous()):
        options = stride, padding, dilation, transposed, output_padding, groups
        return aten.convolution_backward(g, x, weight, None, *options, mask)[0]
    # A CPU's kernel for single pixels is twice as fast without strides.
    seen = x[(..., *where)]
    ones = [1] * len(stride)
    options = ones, padding, dilation, transposed, output_padding, groups
    gradient = torch.zeros_like(x)
    gradient[(..., *where)] = aten.convolution_backward(
        g, g.new_empty(1).expand_as(seen), weight, None, *options, mask
    )[0]
    return gradient


class LayerNormFunction(Function):
    @staticmethod
    def forward(ctx, x, shape, weight, bias, eps, anchor, weight_use, bias_use):
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.shape, ctx.uses = shape, (weight_use, bias_use)
        return y

    @staticmethod
    def backward(ctx, g):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        weight_use, bias_use = ctx.uses
        if weight_use is not None:
            weight_use.arrive(None, torch.sub(x, mean).mul_(rstd).mul_(g))
        if bias_use is not None:
            bias_use.arrive(None, g)
        gradient = None
        if ctx.needs_input_grad[0]:
            mask = [True, False, False]
            gradient = aten.native_layer_norm_backward(g, x, ctx.shape, mean, rstd, weight, bias, mask)[0]
        return gradient, *[None] * 7


class GroupNormFunction(Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, anchor, weight_use, bias_use):
        x = x if is_channels_last(x) else x.contiguous()
        n, channels = x.shape[:2]
        size = x[0, 0].numel()
        y, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, size, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.groups, ctx.uses = groups, (weight_use, bias_use)
        return y

    @staticmethod
    def backward(ctx, g):
        x, mean, rstd, weight = ctx.saved_tensors
        weight_use, bias_use = ctx.uses
        mask = [ctx.needs_input_grad[0], weight_use is not None, bias_use is not None]
        if is_channels_last(x) and x.shape[1] > FEW_CHANNELS * ctx.groups:
            gradient, scales, shifts = _each_image(g, x, mean, rstd, weight, ctx.groups, mask)
        elif is_channels_last(x):
            x = x.contiguous()
            gradient, scales, shifts = _as_one_image(g, x, mean, rstd, weight, ctx.groups, mask)
            gradient = None if gradient is None else gradient.contiguous(memory_format=torch.channels_last)
        else:
            gradient, scales, shifts = _as_one_image(g, x, mean, rstd, weight, ctx.groups, mask)
        if weight_use is not None:
            weight_use.arrive(None, scales)
        if bias_use is not None:
            bias_use.arrive(None, shifts)
        return gradient, *[None] * 7


def _as_one_image(g, x, mean, rstd, weight, groups: int, mask: list[bool]):
    """Group norm's backward pass with gradients of scale and shift per example, ``[N, C]``.

    One image with the channels of all examples is the same computation, and its gradients of scale and
    shift, one for each channel, are those of the examples.
    """
    n, channels = x.shape[:2]
    size = x[0, 0].numel()
    gradient, scales, shifts = aten.native_group_norm_backward(
        g.contiguous().view(1, n * channels, size),
        x.view(1, n * channels, size),
        mean.view(1, -1),
        rstd.view(1, -1),
        None if weight is None else weight.repeat(n),
        1,
        n * channels,
        size,
        n * groups,
        mask,
    )
    gradient, scales, shifts = (
        None if t is None else t.view(shape)
        for t, shape in ((gradient, x.shape), (scales, (n, channels)), (shifts, (n, channels)))
    )
    return gradient, scales, shifts


def _each_image(g, x, mean, rstd, weight, groups: int, mask: list[bool]):
    """The same where channels lie last, so that those of several images do not lie together."""
    channels, size = x.shape[1], x[0, 0].numel()
    g = g.contiguous(memory_format=torch.channels_last)
    each = [
        aten.native_group_norm_backward(*one, weight, 1, channels, size, groups, mask)
        for one in zip(g.split(1), x.split(1), mean.split(1), rstd.split(1))
    ]
    gradients, scales, shifts = zip(*each)
    return (
        torch.cat(gradients) if mask[0] else None,
        torch.stack(scales) if mask[1] else None,
        torch.stack(shifts) if mask[2] else None,
    )


class LookupFunction(Function):
    @staticmethod
    def forward(ctx, indices, table, anchor, use):
        out = table[indices]
        ctx.save_for_backward(indices.remainder(table.shape[0]))  # -1 and V - 1 are one row
        ctx.use = use
        return out

    @staticmethod
    def backward(ctx, g):
        (indices,) = ctx.saved_tensors
        ctx.use.arrive(indices, g)
        return None, None, None, None


class ExpandFunction(Function):
    """Broadcast a parameter-only value to the shape in which it meets data."""

    @staticmethod
    def forward(ctx, value, shape, anchor, use):
        ctx.use = use
        return value.expand(shape)

    @staticmethod
    def backward(ctx, g):
        ctx.use.arrive(None, g)
        return None, None, None, None


class TapFunction(Function):
    """Zeros ``[rows, N]``, added inside a loop to ``h W^T + b`` to catch the gradient of every step."""

    @staticmethod
    def forward(ctx, anchor, shape, dtype, weight_use, bias_use, operand):
        ctx.uses, ctx.operand = (weight_use, bias_use), operand
        return anchor.new_zeros(shape, dtype=dtype)

    @staticmethod
    def backward(ctx, g):
        weight_use, bias_use = ctx.uses
        if weight_use is not None:
            weight_use.arrive(ctx.operand(), g)
        if bias_use is not None:
            bias_use.arrive(None, g)
        return None, None, None, None, None, None
