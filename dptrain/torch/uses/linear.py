"""Linear maps: ``y = x W^T`` (``linear``), ``x W`` (``matmul``), and E of them side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import products
from ..layout import Placement, Routed
from . import gram
from .base import Factors, Rule, Size, add_to, positions_of, reduce_to, widen


@dataclass(frozen=True)
class Linear(Rule):
    """``a [..., K]``, ``g [..., N]``; the value is ``[N, K]`` or, if ``transposed``, ``[K, N]``."""

    transposed: bool = False
    features = 1

    def _order(self, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return (a, g) if self.transposed else (g, a)

    def has_gram(self, layout: Placement) -> bool:
        return True

    def size(self, value: torch.Size, a: Tensor | None, g: Tensor, batch_size: int) -> Size:
        return Size(1, positions_of(g, batch_size, 1), value[0], value[1])

    def _examples(self, a: Tensor, g: Tensor, layout: Placement, batch_size: int) -> tuple[Tensor, Tensor]:
        rows, cols = self._order(a, g)
        return (
            widen(layout.examples_first(rows, batch_size, 1)),
            widen(layout.examples_first(cols, batch_size, 1)),
        )

    def factors(self, a: Tensor | None, g: Tensor, layout: Placement, batch_size: int) -> Factors:
        rows, cols = self._examples(a, g, layout, batch_size)
        return Factors(rows.unsqueeze(1), cols.unsqueeze(1))

    def squared_norms(self, a, g, layout, batch_size):
        return gram.squared_norms(*self.factors(a, g, layout, batch_size))

    def example_gradients(self, value, a, g, layout, batch_size, out=None):
        rows, cols = self._examples(a, g, layout, batch_size)
        return products.each(rows, cols, out)

    def contract(self, value, a, g, weights, layout, batch_size, into=None):
        a, g = widen(a), widen(g)
        if weights is not None:  # the narrower operand is weighted, which touches less memory
            if a.shape[-1] < g.shape[-1]:
                a = a * layout.per_row(weights, a.dim())
            else:
                g = g * layout.per_row(weights, g.dim())
        rows, cols = (t.reshape(-1, t.shape[-1]) for t in self._order(a, g))
        return products.add_product(into, rows, cols)


@dataclass(frozen=True)
class GroupedLinear(Rule):
    """E linear maps side by side: ``a [E, ..., K]``, ``g [E, ..., N]``, value ``[E, K, N]``.

    What an einsum or a matmul with a value of three axes becomes; the examples lie on one of the
    axes between.
    """

    features = 1

    def has_gram(self, layout: Placement) -> bool:
        return isinstance(layout, Routed) or layout.axis > 0

    def size(self, value: torch.Size, a: Tensor | None, g: Tensor, batch_size: int) -> Size:
        return Size(value[0], positions_of(g, batch_size, 1) // value[0], value[1], value[2])

    def factors(self, a: Tensor | None, g: Tensor, layout: Placement, batch_size: int) -> Factors:
        if isinstance(layout, Routed):
            grouped = layout.by_group()
            rows, cols = (widen(grouped.sorted_rows(t, batch_size)) for t in (a, g))
            shape = (batch_size, g.shape[0], -1)
            return Factors(rows.reshape(*shape, a.shape[-1]), cols.reshape(*shape, g.shape[-1]))

        def canonical(t: Tensor) -> Tensor:
            split = layout.split(t, batch_size)  # [B, E, ..., F]
            return widen(split.reshape(batch_size, t.shape[0], -1, t.shape[-1]))

        return Factors(canonical(a), canonical(g))

    def squared_norms(self, a, g, layout, batch_size):
        return gram.squared_norms(*self.factors(a, g, layout, batch_size))

    def example_gradients(self, value, a, g, layout, batch_size, out=None):
        if (
            not isinstance(layout, Routed) and layout.axis == 0
        ):  # each group belongs to one example: all others get zero
            whole = self.contract(value, a, g, None, layout, batch_size)
            return reduce_to(whole, tuple(value), layout, batch_size)
        rows, cols = self.factors(a, g, layout, batch_size)
        return rows.mT @ cols

    def contract(self, value, a, g, weights, layout, batch_size, into=None):
        if weights is not None:
            g = g * layout.per_row(weights, g.dim())
        rows, cols = widen(a).flatten(1, -2), widen(g).flatten(1, -2)
        return add_to(into, rows.mT @ cols)
