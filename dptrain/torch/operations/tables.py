"""Embeddings, indexing, and writing into data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..capture import Capture
from ..errors import Refused
from ..functions import LookupFunction
from ..uses.lookup import Lookup
from .generic import generic
from .values import spread


def _lookup(capture: Capture, table: Tensor, indices: Tensor, padding: int | None) -> Tensor:
    use = capture.use(Lookup(padding, table.dim() - 1), table, "embedding")
    return LookupFunction.apply(indices, table.detach(), capture.anchor, use)


def embedding(capture, func, input, weight, padding_idx=None, max_norm=None, norm_type=2.0,
              scale_grad_by_freq=False, sparse=False):  # fmt: skip
    if func is not F.embedding:  # torch.embedding orders its arguments otherwise
        input, weight, max_norm = weight, input, None
        padding_idx = -1 if padding_idx is None else padding_idx
        padding_idx = None if padding_idx == -1 else padding_idx
    if max_norm is not None or scale_grad_by_freq:
        raise Refused(
            "an embedding with max_norm or scale_grad_by_freq changes its table by what the whole "
            "batch looks up: turn the option off."
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _lookup(capture, weight, input, padding_idx)


def embedding_bag(capture, func, input, weight, offsets=None, max_norm=None, norm_type=2.0,
                  scale_grad_by_freq=False, mode="mean", sparse=False, per_sample_weights=None,
                  include_last_offset=False, padding_idx=None):  # fmt: skip
    """Bags of equal size, ``input [B, N]``: look up, then reduce over each example's own bag."""
    if func is not F.embedding_bag or input.dim() != 2:
        raise Refused(
            "an embedding bag of one long list of indices has no axis of examples: pass them as a matrix "
            "[B, N], padded with padding_idx."
        )
    rows = capture(F.embedding, input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is None:
        counted = torch.ones_like(input, dtype=torch.bool)
    else:
        counted = input != padding_idx % weight.shape[0]
    counted = capture.mark_data(counted.unsqueeze(-1))
    if mode == "max":
        top = torch.where(counted, rows, -torch.inf).max(1).values
        return torch.where(counted.any(1), top, 0.0)
    if per_sample_weights is not None:
        column = capture(torch.Tensor.unsqueeze, per_sample_weights, -1)
        rows = capture(torch.mul, capture.mark_data(rows), column)
    total = torch.where(counted, rows, 0.0).sum(1)
    return total / counted.sum(1).clamp(min=1) if mode == "mean" else total


def _all_alike(tensor: Tensor, axis: int) -> bool:
    """Whether an axis was expanded, so that it does not matter which of its entries are picked."""
    return tensor.shape[axis] == 1 or tensor.stride(axis) == 0


def getitem(capture, func, tensor, index):
    while isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    if capture.is_parameter(tensor) and isinstance(index, Tensor) and index.dim() > 0:
        if index.dtype == torch.bool and index.dim() == 1 and _all_alike(tensor, 0):
            return spread(capture, tensor[:1], (int(index.sum()), *tensor.shape[1:]), "getitem")
        if index.dtype in (torch.int64, torch.int32):
            if _all_alike(tensor, 0):
                return spread(capture, tensor[0], (*index.shape, *tensor.shape[1:]), "getitem")
            return _lookup(capture, tensor, index.long(), None)
    return generic(capture, func, (tensor, index), {})


def index_select(capture, func, input, dim, index):
    if capture.is_parameter(input) and input.dim() > 0 and index.dim() == 1:
        dim %= input.dim()
        if _all_alike(input, dim):
            shape = (*input.shape[:dim], len(index), *input.shape[dim + 1 :])
            return spread(capture, input.narrow(dim, 0, 1), shape, "index_select")
        if dim == 0:
            return _lookup(capture, input, index.long(), None)
    return generic(capture, func, (input, dim, index), {})


def setitem(capture, func, tensor, index, value):
    if not capture.is_data(tensor):
        raise Refused(
            "data is written in place into a value made of parameters or constants after parameters "
            "were written into it: write the data first, or use torch.cat or torch.where."
        )
    if capture.is_parameter(value):
        value = spread(capture, value, tensor.detach()[index].shape, "setitem")
    out = func(tensor, index, value)
    capture._mark_targets(func, (tensor, index, value), {})
    return out
