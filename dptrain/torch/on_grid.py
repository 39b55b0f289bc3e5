"""Clipped gradients on the integer grid of hardened steps, and their exact sums.

An example's clipped gradient is rounded towards zero to multiples of the spacing. Then it is checked, and not
only believed, that sum_i n_i^2 <= (C / spacing)^2 for the multiples n_i, which are summed in int64: the sum
moves by at most C with one example more or less, whatever the order of summation, with no rounding to be
considered. (``core/grid.py`` says why nothing overflows.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .uses.base import widen

#: elements from which each example is converted by itself, to save memory
LARGE = 2**16


class GridSums:
    """Sums of clipped examples on a grid.

    Args:
        parameters: by name.
        clip_norm: C.
        grid: the spacing, a power of two.
        into: sums by name, to which examples are added in place; new ones by default.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        clip_norm: float,
        grid: float,
        into: dict[str, Tensor] | None = None,
    ):
        self.clip_norm, self.grid = clip_norm, grid
        self.elements = sum(p.numel() for p in parameters.values())
        self.sums = zeros(parameters) if into is None else into

    @property
    def slack(self) -> float:
        """A bound on the relative error of a sum of squares in float64: 2^-53 for each square, each addition,
        and a few for the square root and the limit (Higham 2002, section 4.2)."""
        return (self.elements + 32) * 2.0**-52

    @property
    def aim(self) -> float:
        """To what norm an example has to be clipped so that the check, slack included, lets it pass."""
        return self.clip_norm * (1 - self.slack)

    def add(self, gradients: dict[str, Tensor], factors: Tensor, included: Tensor) -> None:
        """Add examples with gradients ``[B, *parameter]`` by name.

        Args:
            factors: clip factors ``[B]`` for the norm ``aim``, float32 or better.
            included: ``[B]`` bool; the others contribute nothing, whatever they hold.
        """
        squares = torch.zeros(len(factors), dtype=torch.float64, device=factors.device)
        for name, gradient in gradients.items():
            multiples = self._multiples(gradient, factors, included)
            squares += _squared_norms(multiples)
            _add(self.sums[name], multiples, 1)
        too_long = squares * (1 + self.slack) > (self.clip_norm / self.grid) ** 2
        if bool(too_long.any()):  # integers: what was added is taken away to the last bit
            for name, gradient in gradients.items():
                _add(self.sums[name], self._multiples(gradient, factors, included)[too_long], -1)

    def _multiples(self, gradient: Tensor, factors: Tensor, included: Tensor) -> Tensor:
        """``[B, *parameter]``, whole numbers in floating point."""
        g = widen(gradient.detach())
        shape = (-1, *[1] * (g.dim() - 1))
        scale = torch.where(included, factors, 0.0).to(g.dtype) / self.grid  # exact: a power of two
        most = math.floor(self.clip_norm / self.grid)
        multiples = torch.where(included.reshape(shape), g, 0.0)
        return multiples.mul_(scale.reshape(shape)).trunc_().clamp_(-most, most)


def _squared_norms(multiples: Tensor) -> Tensor:
    """``[B]``, in float64."""
    rows = multiples.reshape(len(multiples), -1)
    if rows.shape[1] < LARGE:
        return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square_()
    return torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows]).square_()


def _add(total: Tensor, multiples: Tensor, sign: int) -> None:
    if total.numel() < LARGE:
        total.add_(multiples.to(torch.int64).sum(0), alpha=sign)
        return
    for example in multiples:
        total.add_(example.to(torch.int64), alpha=sign)


def zeros(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum over no examples."""
    return {
        name: torch.zeros_like(p, dtype=torch.int64, requires_grad=False) for name, p in parameters.items()
    }
