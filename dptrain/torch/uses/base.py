"""A use: an operation in which a parameter-only value meets data.

A rule says how the gradient with respect to that value is formed from what the operation saw
(its other operand ``a`` and the gradient ``g`` of its output). Two families cover everything:

* *outer* uses, whose gradient is a sum over positions of outer products (linear maps,
  convolutions, table look-ups). They have a Gram form, so their norm needs no gradient.
* *direct* uses, whose per-example gradient is a reduction of ``g`` (biases, scales, anything that
  was broadcast against data, the generic rule).

Canonical shapes, after Dangel et al.'s curvlinops: ``rows [B, E, T, R]`` and ``cols [B, E, T, C]``
with B examples, E groups, T positions; the gradient of example b is
``sum_t rows[b, e, t, :] (x) cols[b, e, t, :]`` of shape ``[E, R, C]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dptrain.core.clipping_error import BLOCK

from ..layout import Placement, Routed


class Factors(NamedTuple):
    """Canonical factors of an outer use: ``rows [B, E, T, R]``, ``cols [B, E, T, C]``."""

    rows: Tensor
    cols: Tensor


class Size(NamedTuple):
    """What costs depend on, per example: groups E, positions T, rows R, cols C."""

    groups: int
    positions: int
    rows: int
    cols: int


def widen(tensor: Tensor) -> Tensor:
    """To float32 or better: norms and clipped sums are never formed in a compute type (rule 7)."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type that ``widen`` casts to."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """Whether a batch of images lies in memory with its channels last."""
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Rule:
    """How a use's gradient is formed. Equal rules on equal shapes cost the same."""

    #: the last axes of ``g`` that are features and so cannot hold the examples
    features = 0

    @property
    def kind(self) -> str:
        return type(self).__name__.lower()

    def row_axes(self, g: Tensor) -> int:
        """How many leading axes of ``g`` are rows, each of which could belong to another example."""
        return g.dim() - self.features

    def has_gram(self, layout: Placement) -> bool:
        """Whether the norm has a Gram form where the examples lie as ``layout`` says."""
        return False

    def size(self, value: torch.Size, a: Tensor | None, g: Tensor, batch_size: int) -> Size | None:
        """Canonical size of an outer use, None for a direct one."""
        return None

    def factors(self, a: Tensor | None, g: Tensor, layout: Placement, batch_size: int) -> Factors:
        raise NotImplementedError(f"{self.kind} has no outer-product form")

    def example_gradients(
        self,
        value: torch.Size,
        a: Tensor | None,
        g: Tensor,
        layout: Placement,
        batch_size: int,
        out: Tensor | None = None,
    ) -> Tensor:
        """Per-example gradients ``[B, *value]`` in float32 or better; in ``out``, where a rule can."""
        raise NotImplementedError

    def squared_norms(
        self, a: Tensor | None, g: Tensor, layout: Placement, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Squared norms ``[B]`` by the Gram form and a bound ``[B]`` on their rounding error."""
        raise NotImplementedError(f"{self.kind} has no Gram form")

    def contract(
        self,
        value: torch.Size,
        a: Tensor | None,
        g: Tensor,
        weights: Tensor | None,
        layout: Placement,
        batch_size: int,
        into: Tensor | None = None,
    ) -> Tensor:
        """Sum over examples, each weighted by ``weights [B]`` (None: already in ``g``).

        It is added to ``into``, contiguous and of the value's shape, if there is one.
        """
        gradients = self.example_gradients(value, a, g, layout, batch_size)
        return weighted_sum(gradients, weights, into)

    def zero_rows(
        self, a: Tensor | None, g: Tensor, keep: Tensor, layout: Placement
    ) -> tuple[Tensor | None, Tensor]:
        """Both operands with the rows of the examples not in ``keep [B]`` set to zero.

        A product with zero is not enough: 0 * NaN is NaN (rule 4).
        """
        clean = torch.where(layout.per_row(keep, g.dim()), g, torch.zeros((), dtype=g.dtype, device=g.device))
        if a is not None and a.is_floating_point():
            a = torch.where(layout.per_row(keep, a.dim()), a, torch.zeros((), dtype=a.dtype, device=a.device))
        return a, clean


def add_to(into: Tensor | None, total: Tensor) -> Tensor:
    """``total``, added to ``into`` in place if there is one."""
    return total if into is None else into.add_(total)


def weighted_sum(gradients: Tensor, weights: Tensor | None, into: Tensor | None = None) -> Tensor:
    """``sum_b weights[b] gradients[b]``, shape ``gradients.shape[1:]``, added to ``into`` if there is one."""
    if weights is None:
        return add_to(into, gradients.sum(0))
    flat = gradients.reshape(gradients.shape[0], -1)
    weights = weights.to(flat.dtype).unsqueeze(0)
    if into is None or into.dtype != flat.dtype:
        return add_to(into, (weights @ flat).reshape(gradients.shape[1:]))
    into.view(1, -1).addmm_(weights, flat)
    return into


def squared_norm(gradients: Tensor) -> Tensor:
    """Squared norms ``[B]`` of ``[B, ...]``, accumulated in float32 or better, as
    ``core/clipping_error.py`` has it."""
    flat = widen(gradients).reshape(gradients.shape[0], -1)
    if flat.shape[1] <= BLOCK:
        return torch.linalg.vector_norm(flat, dim=1).square()
    # A CPU's norm adds one square after the other, and in float32 the sum of millions of them swallows
    # the small ones, so that the norm is understated. Blocks are joined in float64.
    over = flat.shape[1] % BLOCK
    whole = flat[:, : flat.shape[1] - over] if over else flat
    parts = torch.linalg.vector_norm(whole.reshape(len(flat), -1, BLOCK), dim=2)
    if over:
        rest = torch.linalg.vector_norm(flat[:, -over:], dim=1, keepdim=True)
        parts = torch.cat([parts, rest], 1)
    return torch.linalg.vector_norm(parts, dim=1, dtype=torch.float64).square_().to(flat.dtype)


def reduce_to(gradient: Tensor, aligned: tuple[int, ...], layout: Placement, batch_size: int) -> Tensor:
    """Per-example gradients of a value that was broadcast from ``aligned`` to ``gradient.shape``.

    Returns ``[B, *aligned]``. Where the value itself varies along the axis of the examples (a
    position table expanded and then transformed), row b of the result keeps only its own rows.
    """
    if isinstance(layout, Routed):
        return _reduce_rows(gradient, aligned, layout, batch_size)
    axis = layout.axis
    ndim = gradient.dim()
    if axis == 0 and layout.outer == 1 and aligned[0] == 1:  # as below, in as few calls as there can be
        summed = [d + 1 for d in range(1, ndim) if aligned[d] == 1 and gradient.shape[d] > 1]
        if layout.inner == 1 and not summed:
            return widen(gradient).reshape(batch_size, *aligned)
        rows = gradient.reshape(batch_size, layout.inner, *gradient.shape[1:])
        return rows.sum([1, *summed], dtype=wide_type(gradient.dtype)).reshape(batch_size, *aligned)
    split = layout.split(gradient, batch_size)  # [B, ..., outer, inner, ...]
    if aligned[axis] == 1:
        summed = [d for d in range(ndim) if aligned[d] == 1 and d != axis]
        dims = [d + 1 if d < axis else d + 2 for d in summed] + [axis + 1, axis + 2]
        return split.sum(dims, dtype=wide_type(gradient.dtype)).reshape(batch_size, *aligned)
    rows = torch.zeros(batch_size, *gradient.shape, dtype=wide_type(gradient.dtype), device=gradient.device)
    examples = torch.arange(batch_size, device=gradient.device)
    # examples_of[b] is a view of rows[b] with the axis unfolded; its own slot receives its rows
    unfolded = rows.reshape(
        batch_size,
        *gradient.shape[:axis],
        layout.outer,
        batch_size,
        layout.inner,
        *gradient.shape[axis + 1 :],
    ).movedim(axis + 2, 1)
    unfolded[examples, examples] = split.to(rows.dtype)
    summed = [d + 1 for d in range(ndim) if aligned[d] == 1]
    return (rows.sum(summed) if summed else rows).reshape(batch_size, *aligned)


def _reduce_rows(gradient: Tensor, aligned: tuple[int, ...], layout: Routed, batch_size: int) -> Tensor:
    """``reduce_to`` for rows that were routed: each is added up for its example, nobody's for no one."""
    axes = layout.owners.dim()
    places = torch.arange(math.prod(aligned[:axes]), device=gradient.device).reshape(aligned[:axes])
    places = places.expand(layout.owners.shape)
    mine = layout.owners >= 0
    target = (layout.owners * math.prod(aligned[:axes]) + places)[mine]
    rows = gradient.reshape(*layout.owners.shape, math.prod(gradient.shape[axes:]))[mine]
    dtype = wide_type(gradient.dtype)
    total = torch.zeros(
        batch_size * math.prod(aligned[:axes]), rows.shape[-1], dtype=dtype, device=gradient.device
    )
    return total.index_add_(0, target, rows.to(dtype)).reshape(batch_size, *aligned)


def positions_of(tensor: Tensor, batch_size: int, keep: int) -> int:
    """Number of positions per example, the last ``keep`` axes being features."""
    return math.prod(tensor.shape[: tensor.dim() - keep]) // batch_size
