"""Norm layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture import Capture
from ..errors import Refused
from ..functions import GroupNormFunction, LayerNormFunction
from ..uses.broadcast import Broadcast
from .generic import generic
from .values import entering, raised

BATCH_STATISTICS = {"batch_norm", "_batch_norm_impl_index", "native_batch_norm"}


def refuse_batch_statistics(func, args: tuple, kwargs: dict) -> None:
    if getattr(func, "__name__", "") not in BATCH_STATISTICS:
        return
    training = kwargs.get("training", args[5] if len(args) > 5 else False)
    if training:
        raise Refused(
            "BatchNorm in training mode lets one example move another's gradient, so no "
            "per-example gradient exists: replace it by GroupNorm with dptrain.torch.convert(model), or "
            "call .eval() on the BatchNorm layers to use their running statistics."
        )


def _affine(capture: Capture, y: Tensor, weight, bias, shape: tuple[int, ...] | None) -> Tensor:
    """``y * weight + bias``, each seen as ``shape`` (None: as it is)."""
    for function, value in ((torch.mul, weight), (torch.add, bias)):
        if value is None:
            continue
        if shape is not None:
            is_data = capture.is_data(value)
            value = value.reshape(shape)
            value = capture.mark_data(value) if is_data else value
        y = capture(function, y, value)
    return y


def layer_norm(capture, func, input, normalized_shape, weight=None, bias=None, eps=1e-5, *rest, **kwargs):
    shape = list(normalized_shape)
    if not capture.is_data(input):
        raise Refused("layer_norm of a parameter with a weight that depends on data")
    if any(v is not None and capture.is_data(v) for v in (weight, bias)):
        y = capture.mark_data(F.layer_norm(raised(input), shape, None, None, eps))
        return _affine(capture, y, weight, bias, None)
    lead = (1,) * (input.dim() - len(shape))
    uses: list[Any] = [None, None]
    for i, (value, label) in enumerate(((weight, ""), (bias, " bias"))):
        if value is not None and capture.is_parameter(value):
            uses[i] = capture.use(Broadcast((*lead, *value.shape)), value, "layer_norm" + label)
    x = raised(input)
    w, b = (None if v is None else entering(v, x.dtype) for v in (weight, bias))
    return LayerNormFunction.apply(x, shape, w, b, eps, capture.anchor, *uses)


def rms_norm(capture, func, input, normalized_shape, weight=None, eps=None):
    y = capture.mark_data(F.rms_norm(raised(input), normalized_shape, None, eps))
    return _affine(capture, y, weight, None, tuple(weight.shape))


def group_norm(capture, func, input, num_groups, weight=None, bias=None, eps=1e-5, *rest, **kwargs):
    if input.numel() == 0 or not capture.is_data(input):
        return generic(capture, func, (input, num_groups, weight, bias, eps), {})
    x = raised(input)
    if any(v is not None and capture.is_data(v) for v in (weight, bias)):
        y = capture.mark_data(F.group_norm(x, num_groups, None, None, eps))
        return _affine(capture, y, weight, bias, (-1,) + (1,) * (input.dim() - 2))
    uses: list[Any] = [None, None]
    for i, (value, label) in enumerate(((weight, ""), (bias, " bias"))):
        if value is not None and capture.is_parameter(value):
            uses[i] = capture.use(Broadcast((1, *value.shape)), value, "group_norm" + label)
    w, b = (None if v is None else entering(v, x.dtype) for v in (weight, bias))
    return GroupNormFunction.apply(x, num_groups, w, b, eps, capture.anchor, *uses)


def instance_norm(capture, func, input, running_mean=None, running_var=None, weight=None, bias=None,
                  use_input_stats=True, momentum=0.1, eps=1e-5, *rest):  # fmt: skip
    if running_mean is not None:
        raise Refused(
            "instance_norm with running statistics mixes examples in its buffers: set "
            "track_running_stats=False, or use dptrain.torch.convert(model)."
        )
    y = capture.mark_data(F.instance_norm(raised(input), None, None, None, None, True, momentum, eps))
    return _affine(capture, y, weight, bias, (-1,) + (1,) * (input.dim() - 2))


def batch_norm(capture, func, input, running_mean, running_var, weight=None, bias=None, training=False,
               momentum=0.1, eps=1e-5, *rest):  # fmt: skip
    if func is not F.batch_norm:  # torch.batch_norm orders its arguments otherwise
        running_mean, running_var, weight, bias = weight, bias, running_mean, running_var
    if running_mean is None:
        raise Refused(
            "BatchNorm without running statistics mixes examples: replace it by GroupNorm with "
            "dptrain.torch.convert(model)."
        )
    y = capture.mark_data(F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps))
    return _affine(capture, y, weight, bias, (-1,) + (1,) * (input.dim() - 2))
