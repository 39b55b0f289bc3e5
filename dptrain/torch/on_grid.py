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

#: elements that are rounded at once: so many stay in a cache until they are summed
AT_ONCE = 2**17


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
        factors = torch.where(included, factors, 0.0)
        for name, gradient in gradients.items():
            flat, total = gradient.reshape(len(squares), -1), self.sums[name].view(-1)
            few = max(1, AT_ONCE // len(squares))
            for g, part in zip(flat.split(few, 1), total.split(few)):
                multiples = self._multiples(g, factors, included)
                squares += torch.linalg.vector_norm(multiples, dim=1, dtype=torch.float64).square_()
                part += multiples.to(torch.int64).sum(0)
        too_long = squares * (1 + self.slack) > (self.clip_norm / self.grid) ** 2
        if bool(too_long.any()):  # integers: what was added is taken away to the last bit
            for name, gradient in gradients.items():
                flat, total = gradient.reshape(len(squares), -1)[too_long], self.sums[name].view(-1)
                total -= self._multiples(flat, factors[too_long], included[too_long]).to(torch.int64).sum(0)

    def _multiples(self, gradients: Tensor, factors: Tensor, included: Tensor) -> Tensor:
        """``[B, elements]``, whole numbers in floating point."""
        g = widen(gradients.detach())
        scale = factors.to(g.dtype) / self.grid  # exact: a power of two
        most = math.floor(self.clip_norm / self.grid)
        multiples = (g * scale.unsqueeze(1)).trunc_().clamp_(-most, most)
        return torch.where(included.unsqueeze(1), multiples, 0.0)  # 0 * NaN is NaN


def zeros(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum over no examples."""
    return {name: torch.zeros(p.shape, dtype=torch.int64, device=p.device) for name, p in parameters.items()}
