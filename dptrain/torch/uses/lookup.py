"""Rows of a table picked by the data: embeddings and integer indexing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import Placement
from .base import Rule, Size, widen
from .gram import SLACK, gamma


@dataclass(frozen=True)
class Lookup(Rule):
    """``a`` holds indices in ``[0, V)``, ``g [*a.shape, *value[1:]]``; the value is a table ``[V, ...]``.

    Its rows factor is one-hot, so ``R R^T`` is a comparison of indices.
    """

    padding_index: int | None = None
    trailing: int = 1

    @property
    def features(self) -> int:  # type: ignore[override]
        return self.trailing

    def has_gram(self, layout: Placement) -> bool:
        return True

    def size(self, value: torch.Size, a: Tensor | None, g: Tensor, batch_size: int) -> Size:
        return Size(1, a.numel() // batch_size, value[0], value.numel() // value[0])

    def picked(self, a: Tensor, g: Tensor, layout: Placement, batch_size: int) -> tuple[Tensor, Tensor]:
        """Indices ``[B, T]`` and gradients ``[B, T, D]``, those of the padding index zeroed."""
        indices = layout.examples_first(a, batch_size, 0)
        gradient = layout.examples_first(g, batch_size, self.trailing)
        gradient = widen(gradient.reshape(*indices.shape, -1))
        if self.padding_index is not None:
            padding = (indices == self.padding_index).unsqueeze(-1)
            gradient = gradient.masked_fill(padding, 0)
        return indices, gradient

    def squared_norms(self, a, g, layout, batch_size):
        indices, gradient = self.picked(a, g, layout, batch_size)
        same = indices.unsqueeze(2) == indices.unsqueeze(1)  # [B, T, T]
        gram = gradient @ gradient.mT
        length = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
        squared = (gram * same).sum(2).sum(1)
        spread = torch.einsum("bt,bts,bs->b", length, same.to(length.dtype), length)
        terms = gradient.shape[2] + 2 * gradient.shape[1] + 2
        bound = SLACK * gamma(terms, gradient.dtype) * spread
        return squared, bound + same[0].numel() * terms * torch.finfo(gradient.dtype).tiny

    def example_gradients(self, value, a, g, layout, batch_size, out=None):
        indices, gradient = self.picked(a, g, layout, batch_size)
        table = gradient.new_zeros(batch_size * value[0], gradient.shape[2])
        offset = torch.arange(batch_size, device=indices.device).unsqueeze(1) * value[0]
        table.index_add_(0, (indices + offset).flatten(), gradient.flatten(0, 1))
        return table.reshape(batch_size, *value)

    def contract(self, value, a, g, weights, layout, batch_size, into=None):
        indices, gradient = self.picked(a, g, layout, batch_size)
        if weights is not None:
            gradient = gradient * weights.to(gradient.dtype).reshape(-1, 1, 1)
        table = gradient.new_zeros(value[0], gradient.shape[2]) if into is None else into.view(value[0], -1)
        table.index_add_(0, indices.flatten(), gradient.flatten(0, 1).to(table.dtype))
        return table.reshape(value)
