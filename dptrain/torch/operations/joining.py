"""Concatenation, attention, PReLU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .values import spread


def cat(capture, func, tensors, *args, **kwargs):
    name = func.__name__
    return func(
        [spread(capture, t, t.shape, name) if capture.is_parameter(t) else t for t in tensors],
        *args,
        **kwargs,
    )


def column_stack(capture, func, tensors):
    columns = [t.reshape(-1, 1) if t.dim() < 2 else t for t in tensors]
    for old, new in zip(tensors, columns):
        if capture.is_data(old):
            capture.mark_data(new)
    return cat(capture, torch.cat, columns, 1)


def attention(capture, func, query, key, value, attn_mask=None, *args, **kwargs):
    """Scaled dot product attention: a mask or an operand made of parameters enters expanded."""
    if isinstance(attn_mask, Tensor) and capture.is_parameter(attn_mask):
        batch = np.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        shape = (*batch, query.shape[-2], key.shape[-2])
        attn_mask = spread(capture, attn_mask, shape, "attention mask")
    batch = np.broadcast_shapes(*(t.shape[:-2] for t in (query, key, value)))
    query, key, value = (
        spread(capture, t, (*batch, *t.shape[-2:]), "attention") if capture.is_parameter(t) else t
        for t in (query, key, value)
    )
    return func(query, key, value, attn_mask, *args, **kwargs)


def prelu(capture, func, input, weight):
    shape = (-1,) + (1,) * (input.dim() - 2) if weight.numel() > 1 else (1,)
    slope = weight.reshape(shape)
    if capture.is_data(weight):
        capture.mark_data(slope)
    return torch.where(input > 0, input, capture(torch.mul, input, slope))
