"""The generic rule: a copy of the value for each example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..capture import Capture
from ..errors import Refused
from ..functions import ExpandFunction
from ..uses.broadcast import PerExample
from .values import spread


def _first_like(capture: Capture, seen: tuple) -> int:
    alike = [i for i, call in enumerate(capture.generic) if call == seen]
    layouts = [capture.layouts[("generic", i)] for i in alike]
    if not alike or any(layout != layouts[0] for layout in layouts):
        raise Refused(f"{seen[0]} has no rule of its own and cannot be followed in a checkpoint.")
    return alike[0]


def generic(capture: Capture, func, args: tuple, kwargs: dict) -> Any:
    """Any operation: give each example its own copy of the value and let autograd do the rest.

    The operation runs under ``torch.vmap``, on batches of one; which axis of each tensor holds the
    examples is what the probe found by comparing two batch sizes. While the probe is looking
    (``capture.layouts is None``) the operation runs as it is.
    """
    leaves, tree = tree_flatten((args, kwargs))
    tensors = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
    position = len(capture.generic)
    if capture.layouts is None:
        plain = [t.detach() if capture.is_parameter(t) else t for t in leaves]
        args, kwargs = tree_unflatten(plain, tree)
        out = func(*args, **kwargs)
        flat, out_tree = tree_flatten(out)
        shapes = [tuple(leaves[i].shape) for i in tensors]
        capture.generic.append(
            (func.__name__, shapes, [tuple(t.shape) for t in flat if isinstance(t, Tensor)])
        )
        return tree_unflatten(
            [t + 0 * capture.anchor if isinstance(t, Tensor) and t.is_floating_point() else t for t in flat],
            out_tree,
        )
    seen = func.__name__, [tuple(leaves[i].shape) for i in tensors]
    if capture.replaying:  # an activation checkpoint at work: the call was seen in the forward pass
        position = _first_like(capture, seen)
    else:
        capture.generic.append(seen)
    where_in, where_out = capture.layouts[("generic", position)]
    batch_size = capture.batch_size
    entered, axes = [], []
    for i, axis in zip(tensors, where_in):
        t = leaves[i]
        if axis is not None:  # examples on an axis of its own: a batch of one for each
            if capture.is_parameter(t):
                t = spread(capture, t, t.shape, func.__name__)
            if t.shape[axis] % batch_size:
                raise Refused(f"{func.__name__} has no rule of its own, and its rows vary by the data.")
            t = t.unflatten(axis, (batch_size, t.shape[axis] // batch_size))
        elif capture.is_parameter(t):
            use = capture.use(PerExample(), t, func.__name__)
            shape = torch.Size((batch_size, *t.shape))
            t = ExpandFunction.apply(t.detach(), shape, capture.anchor, use)
            axis = 0
        entered.append(t)
        axes.append(axis)

    def one(*parts):
        filled = list(leaves)
        for i, part in zip(tensors, parts):
            filled[i] = part
        a, k = tree_unflatten(filled, tree)
        return tuple(t for t in tree_flatten(func(*a, **k))[0] if isinstance(t, Tensor))

    try:
        outs = torch.vmap(one, tuple(axes), tuple(where_out), randomness="different")(*entered)
    except Exception as error:
        if type(error).__name__ == "_StopRecomputationError":  # a checkpoint has all that it wants
            raise
        raise Refused(
            f"{func.__name__} combines parameters with data in a way for which there is no rule ({error})."
        ) from error
    outs = [o.flatten(axis, axis + 1) for o, axis in zip(outs, where_out)]
    return outs[0] if len(outs) == 1 else tuple(outs)
