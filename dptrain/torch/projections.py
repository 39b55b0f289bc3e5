"""Orthogonal projections of a parameter's gradient: onto some of its coordinates, or onto a subspace.

Made of public things alone (a key, a gradient of public examples), a projection may act before clipping
(``subspace.py``); made of anything but private examples themselves, after the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from dptrain.core import checks
from dptrain.core.entropy import Key


class Projection(Protocol):
    """An orthogonal projection of tensors of one shape: linear, its own transpose, and idempotent."""

    def __call__(self, x: Tensor) -> Tensor:
        """The part of ``x`` that is kept, like ``x``."""
        ...

    def attached(self, value: Tensor) -> Tensor:
        """``value`` itself, whose gradient comes back projected."""
        ...

    @property
    def size(self) -> int:
        """How many numbers say what is kept, to somebody who knows the projection."""
        ...


class Mask:
    """Keeps the coordinates where ``kept``, a bool tensor in the parameter's shape, is True."""

    def __init__(self, kept: Tensor) -> None:
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
            raise TypeError(f"a mask is a bool tensor in the parameter's shape, not {checks.shown(kept)}.")
        self.kept = kept

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(self.kept, x, torch.zeros((), dtype=x.dtype, device=x.device))

    def attached(self, value: Tensor) -> Tensor:
        return torch.where(self.kept, value, value.detach())

    @property
    def size(self) -> int:
        return int(self.kept.sum())


class Subspace:
    """Keeps the part in the span of ``basis [elements of the parameter, rank]``, orthonormal columns.

    Raises:
        TypeError: not a matrix of floating-point numbers.
        ValueError: its columns are not orthonormal, within 1e-3.
    """

    def __init__(self, basis: Tensor) -> None:
        if not isinstance(basis, Tensor) or basis.dim() != 2 or not basis.is_floating_point():
            raise TypeError(f"a basis is a matrix of floating-point numbers, not {checks.shown(basis)}.")
        identity = torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
        if not torch.allclose(basis.mT @ basis, identity, atol=1e-3):
            raise ValueError("the columns of a basis must be orthonormal: take those of torch.linalg.qr.")
        self.basis = basis

    def __call__(self, x: Tensor) -> Tensor:
        basis = self.basis.to(x.dtype)
        return (basis @ (basis.mT @ x.reshape(-1))).reshape(x.shape)

    def attached(self, value: Tensor) -> Tensor:
        fixed = value.detach()
        return fixed + self(value - fixed)  # of a difference that is exactly zero

    @property
    def size(self) -> int:
        return self.basis.shape[1]


def how_many(elements: int, keep: float) -> int:
    """The number of coordinates that a share ``keep`` in (0, 1] of so many is, at least one.

    Raises:
        TypeError, ValueError: no such share.
    """
    share = checks.positive("keep", keep)
    if share > 1:
        raise ValueError(f"keep is the share of coordinates to keep, at most 1, and is {share:g}.")
    return max(1, round(share * elements))


def whole(like: Mapping[str, Tensor]) -> dict[str, Mask]:
    """Masks that keep everything, of tensors by name."""
    return {name: Mask(torch.ones_like(t, dtype=torch.bool)) for name, t in like.items()}


def first_axes(like: Mapping[str, Tensor], rank: int) -> dict[str, Subspace]:
    """Subspaces of the first ``rank`` coordinates, of tensors by name: in place of some that are to come."""
    return {
        name: Subspace(torch.eye(t.numel(), min(rank, t.numel()), dtype=t.dtype, device=t.device))
        for name, t in like.items()
    }


def largest(values: Mapping[str, Tensor], keep: float, *, of_all: bool = False) -> dict[str, Mask]:
    """Masks of the largest magnitudes.

    Args:
        values: by parameter name.
        keep: the share of coordinates to keep, in (0, 1]: of each tensor, or of all together.
        of_all: whether tensors compete with each other.

    Raises:
        TypeError, ValueError: no such share.
    """
    if not of_all:
        return {
            name: Mask(_chosen(v.abs().reshape(-1), how_many(v.numel(), keep)).view(v.shape))
            for name, v in values.items()
        }
    together = torch.cat([v.abs().reshape(-1) for v in values.values()])
    chosen = _chosen(together, how_many(together.numel(), keep))
    parts = chosen.split([v.numel() for v in values.values()])
    return {name: Mask(part.view(v.shape)) for (name, v), part in zip(values.items(), parts, strict=True)}


def at_random(like: Mapping[str, Tensor], keep: float, key: Key) -> dict[str, Mask]:
    """Masks of coordinates that a key decides, the same number of each tensor; on whatever device.

    Args:
        like: tensors of the parameters' shapes and devices, by name.
        keep: the share of coordinates to keep of each, in (0, 1].
        key: of this step and purpose. Whoever has it, or a public one, needs no indices.

    Raises:
        TypeError, ValueError: no such share.
    """
    masks = {}
    for name, tensor in like.items():
        source = torch.Generator().manual_seed(key.child("parameter", name).seed64())
        order = torch.rand(tensor.numel(), generator=source, dtype=torch.float64)
        kept = _chosen(order, how_many(tensor.numel(), keep))
        masks[name] = Mask(kept.view(tensor.shape).to(tensor.device))
    return masks


def _chosen(magnitudes: Tensor, count: int) -> Tensor:
    """Bool, flat, True at the ``count`` largest."""
    kept = torch.zeros(magnitudes.shape, dtype=torch.bool, device=magnitudes.device)
    return kept.index_fill_(0, magnitudes.topk(count, sorted=False).indices, True)


def principal(
    gradients: Mapping[str, Tensor], rank: int, key: Key, iterations: int = 2
) -> dict[str, Subspace]:
    """For each parameter the subspace in which most of the given gradients lies.

    The leading right singular vectors of the matrix of gradients, by block power iteration and QR, as Yu et
    al. 2021 ("Do not let privacy overbill utility: gradient embedding perturbation for private learning",
    arXiv 2102.12677, algorithm 2) find the basis of their embedding; per parameter here.

    Args:
        gradients: by name, of public examples, ``[n, *parameter]``.
        rank: of the subspaces; at most the number of examples and of elements.
        key: from which the iteration starts.
        iterations: products with the matrix and its transpose.

    Raises:
        TypeError, ValueError: no positive whole number.
    """
    rank, iterations = checks.whole("rank", rank), checks.whole("iterations", iterations)
    found = {}
    for name, gradient in gradients.items():
        matrix = gradient.reshape(len(gradient), -1)
        source = torch.Generator().manual_seed(key.child("parameter", name).seed64())
        shape = matrix.shape[1], min(rank, *matrix.shape)
        basis = torch.randn(shape, generator=source, dtype=torch.float64).to(matrix)
        for _ in range(iterations):
            basis = torch.linalg.qr(matrix.mT @ (matrix @ torch.linalg.qr(basis).Q)).Q
        found[name] = Subspace(basis)
    return found
