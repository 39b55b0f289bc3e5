"""Weight standardisation: norms of pulled-back gradients without pulling them back.

A standardised weight ``w' = (w - mean) / sqrt(v + eps)``, per output channel with fan-in n and variance v,
is made of its leaf by a map whose derivative is known. With g the gradient with respect to w', the one
with respect to w has, per channel, the squared norm

    (|g|^2 - (1^T g)^2 / n - (2 - rho) (w'^T g)^2 / n) / (v + eps),    rho = v / (v + eps),

because the derivative is ``(I - 1 1^T / n - w' w'^T / n) / sqrt(v + eps)``, ``1^T w' = 0`` and
``|w'|^2 = n rho``. So an example's norm needs three numbers per channel, from its gradient at w' or from
Gram matrices, and the clipped sum is pulled back once for all examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Placement
from .uses.base import widen
from .uses.convolution import Convolution
from .uses.gram import gamma

#: autograd nodes that keep all elements in their order, wherever they lie in memory
RESHAPES = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "CloneBackward0")

#: products with so many elements stay in a cache until they are summed
PRODUCT_ELEMENTS = 2**20


@dataclass(frozen=True)
class Standardisation:
    """``weight [O, n]`` is the standardised one; ``scale [O]`` is ``1 / sqrt(v + eps)``."""

    weight: Tensor
    scale: Tensor
    eps: float

    @property
    def fan_in(self) -> int:
        return self.weight.shape[1]

    def norms(self, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Squared norms ``[B]`` at the leaf from gradients ``[B, *value]``, and a bound on their error."""
        g = gradients.flatten(2)
        chunk = _chunk(self.fan_in)
        split = g.unflatten(2, (-1, chunk))
        lengths = torch.linalg.vector_norm(split, dim=3)
        lengths = torch.linalg.vector_norm(lengths, dim=2, dtype=torch.float64)  # [B, O]
        total = split.sum(3).sum(2, dtype=torch.float64)
        weight = self.weight.unflatten(1, (-1, chunk))
        several = split.split(max(1, PRODUCT_ELEMENTS // self.weight.numel()))
        along = torch.cat([(some * weight).sum(3) for some in several]).sum(2, dtype=torch.float64)
        squares = self.scale.double().square()
        whole = lengths.square_().mv(squares)
        squared = whole - self._lost(total, along, squares)
        # each of the three numbers is off by gamma times what it would be if nothing cancelled
        rounding = whole.mul_(8 * gamma(chunk + 8, g.dtype))
        return squared.to(g.dtype), self._with_slack(rounding, squared).to(g.dtype)

    def pulled_back(self, gradients: Tensor) -> Tensor:
        """Gradients at the leaf ``[B, O, n]``: slower than their norms, and without cancellation."""
        g = gradients.flatten(2)
        along = (g * self.weight).mean(2, keepdim=True)
        return (g - g.mean(2, keepdim=True) - self.weight * along) * self.scale[:, None]

    def gram_norms(
        self,
        rule: Convolution,
        a: Tensor,
        g: Tensor,
        result: Tensor | None,
        layout: Placement,
        batch_size: int,
    ) -> tuple[Tensor, Tensor]:
        """The same from what the convolution saw.

        Args:
            result: what it yielded in float32 or better and without its bias; None to compute it anew.
        """
        a, g = widen(a), widen(g)
        if result is None:
            result = _convolve(rule, a, self.weight.to(a.dtype).reshape(-1, a.shape[1], *rule.kernel))
        weighted = g * self.scale.reshape(-1, *[1] * (g.dim() - 2))
        whole, bound = rule.squared_norms(a, weighted, layout, batch_size)
        sums, lengths = _patch_sums(rule, a)  # [N, T], [N]
        by_channel = g.flatten(2)  # [N, O, T]
        total = torch.bmm(sums.unsqueeze(1), by_channel.mT).squeeze(1)  # [N, O]
        along = (by_channel * result.flatten(2)).sum(2)
        # sum_t |g_t| |patch_t| is this at most (Cauchy and Schwarz)
        magnitude = by_channel.square().sum(2).sqrt_().mul_(lengths.unsqueeze(1))
        rows = torch.cat((total, along, magnitude), 1)
        each = layout.examples_first(rows, batch_size, 1).sum(1).double()
        total, along, magnitude = each.chunk(3, 1)
        squares = self.scale.double().square()
        # The sum of a patch is sqrt(n) |patch| at most; what the convolution yields is a sum over the fan-in
        # of terms that come to as much, and so is the inner product of w' and 1. A number x that is off by
        # s at most has a square that is off by 2 |x| s + s^2; twice that counts, for ``2 - rho``.
        n, positions = self.fan_in, by_channel.shape[2]
        slips = (
            math.sqrt(n) * gamma(positions + 4, g.dtype),
            math.sqrt(n) * gamma(2 * n + positions + 8, g.dtype),
        )
        slip = torch.cat([magnitude * much for much in slips], 1)
        extra = each[:, : 2 * self.scale.numel()].abs().mul_(4).add_(slip, alpha=2).mul_(slip)
        extra = extra.mv(squares.repeat(2)).div_(n)
        squared = whole.double() - self._lost(total, along, squares)
        rounding = whole.double().abs().mul_(8 * gamma(1, g.dtype)).add_(bound).add_(extra)
        return squared.to(g.dtype), self._with_slack(rounding, squared).to(g.dtype)

    def _lost(self, total: Tensor, along: Tensor, squares: Tensor) -> Tensor:
        """What the mean and the variance take away ``[B]``: from ``1^T g`` and ``w'^T g`` ``[B, O]`` and the
        squares of the scale, in float64; ``2 - rho`` is ``1 + eps / (v + eps)``."""
        numbers = total.square().add_(along.square().mul_(squares * self.eps + 1))
        return numbers.mv(squares).div_(self.fan_in)

    def _with_slack(self, rounding: Tensor, squared: Tensor) -> Tensor:
        """Also what the rounding of the mean and the variance behind ``scale`` can change."""
        return rounding.add_(squared.abs(), alpha=4 * gamma(self.fan_in + 8, self.scale.dtype))


def _chunk(features: int) -> int:
    """The largest number of features, at most 256, that divides them: sums of so many go on in float64."""
    return next((c for c in range(256, 15, -1) if features % c == 0), features)


def _convolve(rule: Convolution, image: Tensor, weight: Tensor) -> Tensor:
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(rule.kernel)]
    return function(image, weight, None, rule.stride, rule.padding, rule.dilation)


def _patch_sums(rule: Convolution, a: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the elements of each patch ``[N, T]``, and the length of all patches ``[N]``."""
    sums = a.sum(1, keepdim=True, dtype=torch.float64)
    squares = a.square().sum(1, keepdim=True)
    sums, squares = (_convolve(rule, t, t.new_ones(1, 1, *rule.kernel)).flatten(1) for t in (sums, squares))
    return sums.to(a.dtype), squares.clamp(min=0).sum(1).sqrt()


def has_gram(rule: Convolution) -> bool:
    """Whether the Gram form of this module holds: plain convolutions of one group."""
    return isinstance(rule, Convolution) and rule.groups == 1 and not rule.transposed


def of(value: Tensor, leaf: Tensor) -> Standardisation | None:
    """How ``value`` was made of ``leaf``, if it was standardised per output channel, else None.

    Many implementations standardise by batch normalisation of the weight as one example
    (``F.batch_norm(w.reshape(1, O, -1), training=True)``); autograd's node has kept what is needed.
    """
    node = _past_reshapes(value.grad_fn)
    if node is None or node.name() != "NativeBatchNormBackward0":
        return None
    plain = node._saved_training and node._saved_weight is None
    source = node._saved_input
    if not plain or value.dim() < 3 or value.shape != leaf.shape or value.dtype != leaf.dtype:
        return None
    if source.shape[:2] != (1, value.shape[0]):
        return None
    below = _past_reshapes(node.next_functions[0][0])
    if getattr(below, "variable", None) is not leaf:
        return None
    return Standardisation(value.detach().flatten(1), node._saved_result2.detach(), node._saved_eps)


def _past_reshapes(node):
    while node is not None and node.name() in RESHAPES:
        node = node.next_functions[0][0]
    return node
