"""Embeddings, indexing, and writing into data."""

from __future__ import annotations

import torch
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
    if max_norm is not None or scale_grad_by_freq:
        raise Refused(
            "an embedding with max_norm or scale_grad_by_freq changes its table by what the whole "
            "batch looks up: turn the option off."
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return _lookup(capture, weight, input, padding_idx)


def getitem(capture, func, tensor, index):
    while isinstance(index, tuple) and len(index) == 1:
        index = index[0]
    integers = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if capture.is_parameter(tensor) and integers:
        return _lookup(capture, tensor, index.long(), None)
    return generic(capture, func, (tensor, index), {})


def index_select(capture, func, input, dim, index):
    if capture.is_parameter(input) and input.dim() > 0 and dim % input.dim() == 0 and index.dim() == 1:
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
    capture._mark_results(func, (tensor, index, value), {}, out)
    return out
