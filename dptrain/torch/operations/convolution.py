"""Convolutions and their transposes, one to three dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import Refused
from ..functions import ConvolutionFunction
from ..uses.broadcast import Broadcast
from ..uses.convolution import Convolution
from .generic import generic
from .values import lowered


def _tuple(value, n: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * n
    return tuple(value) * n if len(value) == 1 else tuple(value)


def convolution(n: int, transposed: bool):
    def rule(capture, func, input, weight, bias=None, stride=1, padding=0, *rest, **kwargs):
        names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        options = dict(zip(names, rest)) | kwargs
        dilation = _tuple(options.get("dilation", 1), n)
        groups = options.get("groups", 1)
        output_padding = _tuple(options.get("output_padding", 0), n)
        stride = _tuple(stride, n)
        if bias is not None and capture.is_data(bias):
            out = rule(capture, func, input, weight, None, stride, padding, *rest, **kwargs)
            column = capture.mark_data(bias.reshape(-1, *[1] * n))
            return capture(torch.add, capture.mark_data(out), column)
        if capture.is_data(weight) and capture.is_data(input) and bias is not None:
            out = func(input, weight, None, stride, padding, *rest, **kwargs)
            column = capture(torch.reshape, bias, (-1, *[1] * n))
            return capture(torch.add, capture.mark_data(out), column)
        if capture.is_data(weight) or not capture.is_data(input):
            return generic(capture, func, (input, weight, bias, stride, padding, *rest), kwargs)
        if input.dim() != n + 2:
            raise Refused(
                f"{func.__name__} on an input of shape {tuple(input.shape)}, which has no axis for "
                f"the examples: give it {n + 2} axes."
            )
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
            if any(t % 2 for t in total):
                input = F.pad(input, [p for t in reversed(total) for p in (t // 2, t - t // 2)])
                padding = 0
            else:
                padding = tuple(t // 2 for t in total)
        padding = _tuple(padding, n)
        x = lowered(input)
        weight_use = bias_use = None
        if capture.is_parameter(weight):
            kernel = tuple(weight.shape[2:])
            kind = Convolution(kernel, stride, padding, dilation, transposed, groups)
            weight_use = capture.use(kind, weight, func.__name__)
        if bias is not None and capture.is_parameter(bias):
            bias_use = capture.use(Broadcast((1, *bias.shape)), bias, func.__name__ + " bias")
        geometry = (stride, padding, dilation, transposed, output_padding, groups)
        return ConvolutionFunction.apply(
            x,
            weight.detach().to(x.dtype),
            None if bias is None else bias.detach().to(x.dtype),
            capture.anchor,
            geometry,
            weight_use,
            bias_use,
            weight_use is not None and weight_use.index in capture.results,
        )

    return rule
