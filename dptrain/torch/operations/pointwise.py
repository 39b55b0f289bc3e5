"""Pointwise operations, known by the tag that PyTorch puts on their operators."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..capture import Capture
from ..errors import Refused
from .values import spread


@functools.cache
def pointwise_name(name: str) -> str | None:
    """The aten name of a pointwise operation however it is spelt (``__iadd__``, ``add_``), or None."""
    base = name
    if base.startswith("__") and base.endswith("__"):
        base = base[2:-2]
        spelt = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}
        for prefix in ("", "r", "i"):
            stem = base[len(prefix) :] if base.startswith(prefix) else ""
            stem = spelt.get(stem, stem)
            if stem and _is_pointwise(stem):
                return stem
        return None
    stem = base[:-1] if base.endswith("_") else base
    stem = {"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div",
            "rtruediv": "div", "rpow": "pow"}.get(stem, stem)  # fmt: skip
    return stem if _is_pointwise(stem) else None


def _is_pointwise(name: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    tags = [getattr(packet, overload).tags for overload in packet.overloads()]
    return bool(tags) and any(torch.Tag.pointwise in t for t in tags)


def pointwise(capture: Capture, func, name: str, args: tuple, kwargs: dict) -> Any:
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    if in_place and capture.is_parameter(args[0]):
        raise Refused(
            f"{name} writes data in place into a value made of parameters only, whose gradient "
            "would be lost: use the operation that returns a new tensor instead."
        )
    if name.startswith("masked_fill"):  # takes numbers only, not tensors of the mask's shape
        out = torch.where(args[1], spread(capture, args[2], args[0].shape, name), args[0])
        return args[0].copy_(out) if in_place else out
    leaves, tree = tree_flatten((args, kwargs))
    shape = np.broadcast_shapes(*[t.shape for t in leaves if isinstance(t, Tensor)])
    entered = [spread(capture, t, shape, name) if capture.is_parameter(t) else t for t in leaves]
    args, kwargs = tree_unflatten(entered, tree)
    out = func(*args, **kwargs)
    if in_place:
        capture._mark_targets(func, args, kwargs)
    return out
