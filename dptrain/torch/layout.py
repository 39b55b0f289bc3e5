"""Where the examples lie in a tensor: the map from rows of an operation back to examples.

Most operations keep the examples on the leading axis, but windows are folded into it
(Swin: ``B * windows``), sequence-first code puts it second, and ``view(-1, d)`` folds positions
into it. All of these are one axis of size ``outer * B * inner`` on which row ``r`` belongs to
example ``(r // inner) % B``: a ``Layout``.

Where the data decide which rows an operation sees (the tokens of an expert, packed sequences), only
the data can tell whose they are: ``Routed``, made anew for each batch (``routing.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Examples lie on ``axis``; row r of it belongs to example ``(r // inner) % batch_size``."""

    axis: int = 0
    outer: int = 1
    inner: int = 1

    def __str__(self) -> str:
        before = f"{self.outer}·" if self.outer > 1 else ""
        after = f"·{self.inner}" if self.inner > 1 else ""
        return f"axis {self.axis}" + (f" as {before}B{after}" if before or after else "")

    def rows(self, batch_size: int) -> int:
        """Size of the axis."""
        return self.outer * batch_size * self.inner

    def fits(self, tensor: Tensor, batch_size: int) -> bool:
        return tensor.dim() > self.axis and tensor.shape[self.axis] == self.rows(batch_size)

    def split(self, tensor: Tensor, batch_size: int) -> Tensor:
        """Bring the examples to the front: ``[B, ...]`` with the other axes kept in their order.

        The folded parts stay as two axes of their own (``outer`` and ``inner``) at the place of
        the axis, so the result has two axes more than ``tensor``. A view.
        """
        shape = tensor.shape
        folded = (self.outer, batch_size, self.inner)
        unfolded = tensor.reshape(*shape[: self.axis], *folded, *shape[self.axis + 1 :])
        return unfolded.movedim(self.axis + 1, 0)

    def examples_first(self, tensor: Tensor, batch_size: int, keep: int) -> Tensor:
        """``[B, positions, *last keep axes]``; a view where the examples lead already."""
        tail = tensor.shape[tensor.dim() - keep :]
        if self.axis == 0 and self.outer == 1:
            return tensor.reshape(batch_size, -1, *tail)
        return self.split(tensor, batch_size).reshape(batch_size, -1, *tail)

    def sorted_rows(self, tensor: Tensor, batch_size: int) -> Tensor:
        """The same tensor, its leading axis sorted by example; a view where it is already."""
        return self.split(tensor, batch_size).reshape(tensor.shape) if self.outer > 1 else tensor

    def per_row(self, weights: Tensor, ndim: int) -> Tensor:
        """Spread a weight per example ``[B]`` over the rows, ready to multiply a ``ndim`` tensor."""
        rows = weights.repeat_interleave(self.inner).repeat(self.outer)
        return rows.reshape((1,) * self.axis + (-1,) + (1,) * (ndim - self.axis - 1))


class Routed:
    """Rows that the data have sent about: each belongs to the example that ``owners`` names.

    Rows of one example are brought together and padded with zeros to the same number for each, so
    that whatever holds for a regular layout holds for this one: zeros add nothing to a gradient.

    Args:
        owners: int64, the shape of the leading axes that are rows, a single number if all belong to
            one example; -1 for rows without a gradient, which are left out.
        batch_size: number of examples.
    """

    def __init__(self, owners: Tensor, batch_size: int):
        flat = owners.flatten()
        order = flat.argsort(stable=True)
        self._rows = order[(flat < 0).sum() :]
        mine = flat[self._rows]
        counts = torch.bincount(mine, minlength=batch_size)
        rank = torch.arange(len(mine), device=flat.device) - (counts.cumsum(0) - counts)[mine]
        self.owners, self.batch_size = owners, batch_size
        #: most rows of any example
        self.width = max(1, int(counts.max()))
        self._places = mine * self.width + rank

    def __str__(self) -> str:
        return "by routing"

    def fits(self, tensor: Tensor, batch_size: int) -> bool:
        return tensor.shape[: self.owners.dim()] == self.owners.shape

    def sorted_rows(self, tensor: Tensor, batch_size: int) -> Tensor:
        """``[B * width, ...]``, the row axes flattened."""
        batch_size = self.batch_size
        axes = self.owners.dim()
        rows = (tensor.flatten(0, axes - 1) if axes else tensor.unsqueeze(0))[self._rows]
        return rows.new_zeros(batch_size * self.width, *rows.shape[1:]).index_copy_(0, self._places, rows)

    def by_group(self) -> Routed:
        """For rows ``[E, T]``: as if each group had examples of its own, ``b * E + e``."""
        groups = self.owners.shape[0]
        group = torch.arange(groups, device=self.owners.device).unsqueeze(1)
        owners = torch.where(self.owners >= 0, self.owners * groups + group, -1)
        return Routed(owners, self.batch_size * groups)

    def split(self, tensor: Tensor, batch_size: int) -> Tensor:
        """``[B, 1, width, ...]``, the row axes flattened."""
        return self.sorted_rows(tensor, batch_size).unflatten(0, (batch_size, 1, self.width))

    def examples_first(self, tensor: Tensor, batch_size: int, keep: int) -> Tensor:
        tail = tensor.shape[tensor.dim() - keep :]
        return self.sorted_rows(tensor, batch_size).reshape(batch_size, -1, *tail)

    def per_row(self, weights: Tensor, ndim: int) -> Tensor:
        rows = torch.where(self.owners >= 0, weights[self.owners.clamp(min=0)], torch.zeros_like(weights[:1]))
        return rows.reshape(*self.owners.shape, *[1] * (ndim - self.owners.dim()))


Placement = Layout | Routed


def candidates(shape: torch.Size, batch_size: int, keep: int = 0) -> list[Layout]:
    """Every layout that a tensor of this shape could have, the most natural first.

    ``keep`` last axes are features and cannot hold the examples.
    """
    found = []
    for axis in range(len(shape) - keep):
        if shape[axis] == 0 or shape[axis] % batch_size:
            continue
        folded = shape[axis] // batch_size
        found += [
            Layout(axis, folded // inner, inner) for inner in range(folded, 0, -1) if folded % inner == 0
        ]
    return found


def row_heights(tensor: Tensor, axes: int) -> Tensor:
    """The sum of magnitudes in each row, where the first ``axes`` axes are rows."""
    inner = list(range(axes, tensor.dim()))
    if not tensor.numel():
        return tensor.new_zeros(tensor.shape[:axes])
    return tensor.abs().sum(inner) if inner else tensor.abs()


def busy(tensor: Tensor, axis: int) -> Tensor:
    """Which positions of an axis hold anything but zeros."""
    if not tensor.numel():
        return torch.zeros(tensor.shape[axis], dtype=torch.bool, device=tensor.device)
    others = [d for d in range(tensor.dim()) if d != axis]
    return (tensor.abs().amax(others) if others else tensor) != 0


def only_rows_of(example: int, busy: Tensor, layout: Layout, batch_size: int) -> bool:
    """Whether all ``busy`` positions of the layout's axis are rows of ``example``."""
    rows = busy.reshape(layout.outer, batch_size, layout.inner).any(2).any(0)
    rows[example] = False
    return not bool(rows.any())
