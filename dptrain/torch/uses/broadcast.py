"""Values that were broadcast against data: biases, scales, tokens, tables, the generic rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import Layout, Routed
from .base import Rule, add_to, reduce_to, wide_type, widen


@dataclass(frozen=True)
class Broadcast(Rule):
    """A value expanded from ``aligned`` (its shape with leading ones) to the shape of ``g``."""

    aligned: tuple[int, ...] = ()

    def row_axes(self, g):
        return max((axis + 1 for axis, size in enumerate(self.aligned) if size == 1), default=0)

    def example_gradients(self, value, a, g, layout, batch_size, out=None):
        lead = g.dim() - len(value)
        leading = isinstance(layout, Layout) and layout.axis == 0 and layout.outer == 1
        single = lead == 1 or (lead == 2 and leading and layout.inner == 1)  # one axis of positions
        if leading and single and g.shape[lead:] == value:  # a bias or a scale, as most are: in two calls
            return g.reshape(batch_size, -1, *value).sum(1, dtype=wide_type(g.dtype))
        return reduce_to(g, self.aligned, layout, batch_size).reshape(batch_size, *value)

    def contract(self, value, a, g, weights, layout, batch_size, into=None):
        if weights is not None:
            g = g * layout.per_row(weights, g.dim())
        summed = [d for d in range(g.dim()) if self.aligned[d] == 1]
        total = g.sum(summed, dtype=wide_type(g.dtype)) if summed else widen(g)
        return add_to(into, total.reshape(value))


@dataclass(frozen=True)
class PerExample(Rule):
    """A value that was handed to each example by itself: ``g [B, *value]`` is the answer."""

    def row_axes(self, g):
        return 1

    def example_gradients(self, value, a, g, layout, batch_size, out=None):
        if isinstance(layout, Routed):
            g = layout.split(g, batch_size).sum((1, 2))
        return g.reshape(batch_size, *value).to(torch.promote_types(g.dtype, torch.float32))
