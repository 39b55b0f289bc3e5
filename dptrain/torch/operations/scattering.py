"""Operations that may send rows from one example's place to another's.

Where an index or a mask picks rows of data, which example they belong to can differ from batch to
batch, even if all shapes stay the same: after one of these, a step checks the owner of every row
(``routing.py``) and does not rely on what the probe saw.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INDEXED = {"__getitem__", "__setitem__", "index_put", "index_put_"}
ALONG_AXIS = {"index_select", "index_add", "index_add_", "index_copy", "index_copy_"}
ALIGNED = {
    "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_",
    "take_along_dim", "sort", "argsort", "topk", "msort",
}  # fmt: skip
ALWAYS = {
    "masked_select", "masked_scatter", "masked_scatter_", "take", "unique", "unique_consecutive",
    "_pack_padded_sequence", "_pad_packed_sequence",
}  # fmt: skip
NAMES = INDEXED | ALONG_AXIS | ALIGNED | ALWAYS | {"repeat_interleave", "embedding"}


def scatters(capture, func, args: tuple, kwargs: dict) -> bool:
    """Whether a call on data may move rows between examples. Gathering along an axis that is not the
    first, or by ``arange`` along it, does not."""
    name = getattr(func, "__name__", "")
    if name not in NAMES:
        return False
    if name in INDEXED:
        return capture.is_data(args[0]) and _by_index(capture, args[1])
    if name in ALONG_AXIS:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        index = kwargs.get("index", args[2] if len(args) > 2 else None)
        return capture.is_data(index) or (isinstance(index, Tensor) and dim == 0 and not _in_order(index))
    if name in ALIGNED:
        return _first_axis(name, args, kwargs)
    if name == "repeat_interleave":
        return any(capture.is_data(t) for t in (*args[1:], *kwargs.values()))
    if name == "embedding":  # a table made of data
        return len(args) > 1 and all(map(capture.is_data, args[:2]))
    return True


def _by_index(capture, index: Any) -> bool:
    items = index if isinstance(index, (tuple, list)) else (index,)
    tensors = [item for item in items if isinstance(item, Tensor)]
    if not tensors:
        return False
    first = items[0]
    if isinstance(first, Tensor):
        return capture.is_data(first) or first.dtype == torch.bool or not _in_order(first)
    return any(map(capture.is_data, tensors))


def _in_order(index: Tensor) -> bool:
    """Whether an index is ``arange``, along whichever axis it lies."""
    flat = index.detach().flatten()
    return torch.equal(flat, torch.arange(len(flat), device=flat.device, dtype=flat.dtype))


def _first_axis(name: str, args: tuple, kwargs: dict) -> bool:
    place = {"take_along_dim": 2, "topk": 2, "msort": None}.get(name, 1)
    dim = kwargs.get("dim", args[place] if place and len(args) > place else -1 if place else 0)
    rank = args[0].dim()
    if dim is None:
        return True
    return (
        isinstance(dim, int) and rank > 0 and dim % rank == 0 and (rank > 1 or name in ("gather", "scatter"))
    )
