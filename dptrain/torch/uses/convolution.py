"""Convolutions of one to three dimensions, grouped, dilated, strided, padded, transposed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import Placement
from .base import Factors, Rule, Size, gram_squared_norms, widen

#: unfolded patches are formed for as many examples at a time as fit into this many bytes
PATCH_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Convolution(Rule):
    """``a [N, I, *S]``, ``g [N, O, *S']``, value ``[O, I / groups, *kernel]``.

    A transposed convolution has value ``[I, O / groups, *kernel]`` and is the adjoint: its weight
    gradient is the one of the convolution that maps ``g`` to ``a``, so the operands change places.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    transposed: bool = False
    groups: int = 1

    @property
    def features(self) -> int:  # type: ignore[override]
        return len(self.kernel) + 1

    @property
    def kind(self) -> str:
        return f"conv{len(self.kernel)}d" + (" transposed" if self.transposed else "")

    def has_gram(self, layout: Placement) -> bool:
        return True

    def size(self, value: torch.Size, a: Tensor | None, g: Tensor, batch_size: int) -> Size:
        out = a if self.transposed else g
        positions = math.prod(out.shape[2:]) * out.shape[0] // batch_size
        return Size(self.groups, positions, value[0] // self.groups, value[1:].numel())

    @property
    def _pointwise(self) -> bool:
        one = (1,) * len(self.kernel)
        return self.kernel == one and self.stride == one and not any(self.padding)

    def _patches(self, image: Tensor, positions: torch.Size) -> Tensor:
        """im2col: ``[N, I, *S] -> [N, E, prod(positions), I / E * prod(kernel)]``."""
        n, channels = image.shape[:2]
        pad = [p for size in reversed(self.padding) for p in (size, size)]
        view = F.pad(image, pad) if any(pad) else image
        for i, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation)):
            view = view.unfold(2 + i, d * (k - 1) + 1, s).narrow(2 + i, 0, positions[i])
            view = view[..., ::d]
        dims = len(self.kernel)  # [N, I, *positions, *kernel]
        view = view.unflatten(1, (self.groups, channels // self.groups))
        order = [0, 1, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims)]
        return view.permute(order).reshape(n, self.groups, positions.numel(), -1)

    def _operands(self, a: Tensor, g: Tensor, layout: Placement, batch_size: int) -> tuple[Tensor, Tensor]:
        """(image, out), examples leading: ``[B * m, I, *S]``, ``[B * m, O, *S']``."""
        image, out = (g, a) if self.transposed else (a, g)
        return layout.sorted_rows(image, batch_size), layout.sorted_rows(out, batch_size)

    def _factors(self, image: Tensor, out: Tensor, examples: int) -> Factors:
        rows = widen(out).flatten(2).unflatten(1, (self.groups, -1)).mT  # [N, E, T, R]
        if self._pointwise:
            cols = widen(image).flatten(2).unflatten(1, (self.groups, -1)).mT
        else:
            cols = self._patches(widen(image), out.shape[2:])
        if image.shape[0] != examples:  # frames or windows folded into the leading axis

            def fold(t: Tensor) -> Tensor:
                return t.unflatten(0, (examples, -1)).movedim(1, 2).flatten(2, 3)

            rows, cols = fold(rows), fold(cols)
        return Factors(rows, cols)

    def factors(self, a, g, layout, batch_size):
        return self._factors(*self._operands(a, g, layout, batch_size), batch_size)

    def _chunks(self, image: Tensor, out: Tensor, batch_size: int):
        """The operands, a few examples at a time, so that patches stay within PATCH_BYTES."""
        per_row = image.shape[1] * math.prod(self.kernel) * out.shape[2:].numel() * 4
        fold = image.shape[0] // batch_size
        step = batch_size if self._pointwise else max(1, PATCH_BYTES // max(1, per_row * fold))
        for start in range(0, batch_size, step):
            stop = min(batch_size, start + step)
            rows = slice(start * fold, stop * fold)
            yield self._factors(image[rows], out[rows], stop - start)

    def squared_norms(self, a, g, layout, batch_size):
        image, out = self._operands(a, g, layout, batch_size)
        parts = [gram_squared_norms(f) for f in self._chunks(image, out, batch_size)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def example_gradients(self, value, a, g, layout, batch_size):
        image, out = self._operands(a, g, layout, batch_size)
        parts = [rows.mT @ cols for rows, cols in self._chunks(image, out, batch_size)]
        gradients = parts[0] if len(parts) == 1 else torch.cat(parts)
        return gradients.reshape(batch_size, *value)

    def contract(self, value, a, g, weights, layout, batch_size):
        if weights is not None:
            g = g * layout.per_row(weights, g.dim())
        a, g = widen(a), widen(g)
        image, out = (g, a) if self.transposed else (a, g)
        padding = self.padding
        if self.transposed:
            # output_padding may leave room for further windows, which the forward pass never had
            image = F.pad(image, [p for size in reversed(padding) for p in (size, size)])
            padding = (0,) * len(padding)
            for i, (n, s, d, k) in enumerate(zip(out.shape[2:], self.stride, self.dilation, self.kernel)):
                image = image.narrow(2 + i, 0, (n - 1) * s + d * (k - 1) + 1)
        zeros = (0,) * len(self.kernel)
        return torch.ops.aten.convolution_backward(
            out,
            image,
            out.new_empty(value),
            None,
            self.stride,
            padding,
            self.dilation,
            False,
            zeros,
            self.groups,
            [False, True, False],
        )[1]
