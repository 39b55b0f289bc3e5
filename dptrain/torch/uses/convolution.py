"""Convolutions of one to three dimensions, grouped, dilated, strided, padded, transposed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import products
from ..layout import Layout, Placement
from . import gram
from .base import Factors, Rule, Size, add_to, widen

#: a CPU takes gradients of so few positions faster from patches, as one product
FEW_POSITIONS = 64
#: positions of all examples up to which the same holds of their sum
FEW_ROWS = 512
#: width of patches from which on copying them is cheap, as that many elements lie side by side
LONG_RUN = 8
#: channels that a CPU's convolution does at a time
LANES = 16
#: of an image: with fewer, a convolution with strides has no fast form with examples as groups
FEW_CHANNELS = 8
#: widths up to which a depthwise gradient is taken from products of rows
BAND = 16
#: unfolded patches and Gram matrices are formed for as many examples at a time as fit into this many bytes
CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Convolution(Rule):
    """``a [N, I, *S]``, ``g [N, O, *S']``, value ``[O, I / groups, *kernel]``.

    A transposed convolution has value ``[I, O / groups, *kernel]`` and is the adjoint: its weight
    gradient is the one of the convolution that maps ``g`` to ``a``, so the operands change places.
    Below, ``image`` is what the kernel slides over and ``out`` is what it yields.
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
    def window(self) -> int:
        """Elements of the kernel if patches overlap so that their Gram matrix is that of pixels, else 1."""
        return math.prod(self.kernel) if all(s == 1 for s in self.stride) else 1

    @property
    def _pointwise(self) -> bool:
        return all(k == 1 for k in self.kernel) and not any(self.padding)

    @property
    def _disjoint(self) -> bool:
        """Whether patches do not overlap, so that they are no larger than the image."""
        return all(k == s for k, s in zip(self.kernel, self.stride)) and all(d == 1 for d in self.dilation)

    def _picked(self, image: Tensor, out: Tensor) -> Tensor:
        """What a pointwise kernel sees: ``[N, I, *S'] -> [N, E, I / E, positions]``; a view if unstrided."""
        steps = zip(self.stride, out.shape[2:])
        image = image[(..., *(slice(0, s * (n - 1) + 1, s) for s, n in steps))]
        return image.flatten(2).unflatten(1, (self.groups, -1))

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
        return widen(layout.sorted_rows(image, batch_size)), widen(layout.sorted_rows(out, batch_size))

    def _rows(self, out: Tensor) -> Tensor:
        return out.flatten(2).unflatten(1, (self.groups, -1)).mT  # [N, E, T, R]

    def _factors(self, image: Tensor, out: Tensor, examples: int) -> Factors:
        rows = self._rows(out)
        cols = self._picked(image, out).mT if self._pointwise else self._patches(image, out.shape[2:])
        if image.shape[0] != examples:  # frames or windows folded into the leading axis

            def fold(t: Tensor) -> Tensor:
                return t.unflatten(0, (examples, -1)).movedim(1, 2).flatten(2, 3)

            rows, cols = fold(rows), fold(cols)
        return Factors(rows, cols)

    def factors(self, a, g, layout, batch_size):
        return self._factors(*self._operands(a, g, layout, batch_size), batch_size)

    def _chunks(
        self, image: Tensor, out: Tensor, batch_size: int, row_bytes: int
    ) -> Iterator[tuple[Tensor, Tensor, int]]:
        """The operands, a few examples at a time, so that what is made of them stays within CHUNK_BYTES."""
        fold = image.shape[0] // batch_size
        step = max(1, CHUNK_BYTES // max(1, row_bytes * fold))
        for start in range(0, batch_size, step):
            stop = min(batch_size, start + step)
            rows = slice(start * fold, stop * fold)
            yield image[rows], out[rows], stop - start

    def _factor_chunks(self, image: Tensor, out: Tensor, batch_size: int) -> Iterator[Factors]:
        positions = out.shape[2:].numel()
        per_row = 0 if self._pointwise else image.shape[1] * math.prod(self.kernel) * positions * 4
        for part in self._chunks(image, out, batch_size, per_row):
            yield self._factors(*part)

    # ------------------------------------------------------------------ norms without gradients

    def squared_norms(self, a, g, layout, batch_size):
        image, out = self._operands(a, g, layout, batch_size)
        if self._by_pixels(image, out, batch_size):
            per_row = 4 * self.groups * 2 * self._padded(image).numel() ** 2
            chunks = self._chunks(image, out, batch_size, per_row)
            parts = [self._pixel_norms(i, o) for i, o, _ in chunks]
        else:
            parts = [gram.squared_norms(*f) for f in self._factor_chunks(image, out, batch_size)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _padded(self, image: Tensor) -> torch.Size:
        return torch.Size(s + 2 * p for s, p in zip(image.shape[2:], self.padding))

    def _by_pixels(self, image: Tensor, out: Tensor, batch_size: int) -> bool:
        """Whether the Gram matrix of patches is cheaper by way of that of pixels: S^2 I + k T^2 products
        and additions in place of T^2 I k. It is not where strides skip pixels."""
        if self._pointwise or image.shape[0] != batch_size:
            return False
        pixels, positions, k = image.shape[2:].numel(), out.shape[2:].numel(), math.prod(self.kernel)
        channels = image.shape[1] // self.groups
        fits = 4 * self.groups * 2 * self._padded(image).numel() ** 2 <= CHUNK_BYTES
        # additions move memory: as costly as some 16 products each
        return fits and pixels**2 * channels + 16 * k * positions**2 < positions**2 * channels * k

    def _pixel_norms(self, image: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows(out)
        rr, cc = gram.products(rows, rows), self.patch_gram(image, out.shape[2:])
        r2, c2 = rows.square().sum((1, 2, 3)), cc.diagonal(dim1=2, dim2=3).sum((1, 2))
        channels, k = image.shape[1] // self.groups, math.prod(self.kernel)
        bound = gram.error_bound(
            r2,
            c2,
            gram.row_squares(rr),
            gram.row_squares(cc),
            gram.chunked_gamma(rows.shape[3], rows.dtype),
            gram.chunked_gamma(channels, rows.dtype) + gram.gamma(k, rows.dtype),
            rr[0].numel(),
        )
        bound += gram.underflow(r2, c2, rows.shape[3], k * channels, rr[0].numel())
        return gram.total(rr.mul_(cc)).to(rows.dtype), bound

    def patch_gram(self, image: Tensor, positions: torch.Size) -> Tensor:
        """Inner products of patches ``[N, E, T, T]``: a patch is made of pixels, so those of pixels are
        taken once and added up along the kernel's offsets."""
        pixels = image.flatten(2).unflatten(1, (self.groups, -1)).mT  # [N, E, S, I / E]
        dims = len(self.kernel)
        each = gram.products(pixels, pixels).unflatten(3, image.shape[2:]).unflatten(2, image.shape[2:])
        if any(self.padding):
            each = F.pad(each, [p for size in reversed(self.padding * 2) for p in (size, size)])
        for axis, geometry in enumerate(zip(self.kernel, self.dilation, self.stride, positions)):
            each = _summed(each, 2 + axis, 2 + dims + axis, *geometry)  # offsets are added axis by axis
        return each.flatten(2 + dims).flatten(2, 1 + dims)

    # ------------------------------------------------------------------ gradients

    def example_gradients(self, value, a, g, layout, batch_size, out=None):
        image, outcome = self._operands(a, g, layout, batch_size)
        few = outcome.shape[2:].numel() < FEW_POSITIONS or (self._disjoint and self.kernel[-1] >= LONG_RUN)
        if image.device.type != "cpu" or self._pointwise or (self.groups == 1 and few):
            return self._by_products(value, image, outcome, batch_size, out)
        if not self.transposed and image.shape[0] == batch_size:
            depthwise = self.groups == image.shape[1] == value[0] and len(self.kernel) == 2
            if depthwise and max(self.kernel) > 3:  # a CPU has a good kernel for small windows only
                return self._depthwise(value, image, outcome, out)
            if self._fit_as_groups(image, outcome):
                return self._as_groups(value, image, outcome)
        return self._one_by_one(value, image, outcome, batch_size, out)

    def _by_products(
        self, value, image: Tensor, outcome: Tensor, batch_size: int, out: Tensor | None
    ) -> Tensor:
        """A matrix product of outputs and patches for each example."""
        if out is None:
            out = image.new_empty(batch_size, *value)
        each = out.view(batch_size, self.groups, value[0] // self.groups, value[1:].numel())
        done = 0
        for rows, cols in self._factor_chunks(image, outcome, batch_size):
            place = each[done : done + len(rows)]  # groups as if they were examples
            products.each(rows.flatten(0, 1), cols.flatten(0, 1), place.view(-1, *place.shape[2:]))
            done += len(rows)
        return out

    def _one_by_one(
        self, value, image: Tensor, outcome: Tensor, batch_size: int, out: Tensor | None
    ) -> Tensor:
        """A CPU's convolutions are as fast for one example as for many, and need no patches."""
        out = image.new_empty(batch_size, *value) if out is None else out
        for b, (one_image, one_out, _) in enumerate(self._chunks(image, outcome, batch_size, CHUNK_BYTES)):
            out[b] = self._weight_gradient(value, one_image, one_out)
        return out

    def _fit_as_groups(self, image: Tensor, outcome: Tensor) -> bool:
        """Whether a CPU is faster with the groups of all examples at once."""
        channels, outer = (t.shape[1] // self.groups for t in (image, outcome))
        if image.is_contiguous() and outcome.is_contiguous():
            return self.groups > 1 or channels >= FEW_CHANNELS or all(s == 1 for s in self.stride)
        return channels % LANES == outer % LANES == 0  # else it does not pay to lay them anew

    def _as_groups(self, value: torch.Size, image: Tensor, outcome: Tensor) -> Tensor:
        """Channels of different examples need not meet, as those of different groups do not."""
        batch_size = len(image)
        together = dataclasses.replace(self, groups=batch_size * self.groups)
        image, outcome = (t.contiguous().flatten(0, 1).unsqueeze(0) for t in (image, outcome))
        gradients = together._weight_gradient(torch.Size((batch_size * value[0], *value[1:])), image, outcome)
        return gradients.view(batch_size, *value)

    def _depthwise(self, value: torch.Size, image: Tensor, outcome: Tensor, out: Tensor | None) -> Tensor:
        """With large windows: by products of rows where they are short."""
        if self.stride == self.dilation == (1, 1) and outcome.shape[3] <= BAND:
            return self._by_bands(value, image, outcome)
        image, outcome = (t.contiguous(memory_format=torch.channels_last) for t in (image, outcome))
        return self._one_by_one(value, image, outcome, len(image), out)

    def _by_bands(self, value: torch.Size, image: Tensor, outcome: Tensor) -> Tensor:
        """Depthwise, from products of whole rows: ``sum_h g[h, w] x[h + i, v]`` is a matrix for each row i of
        the kernel, of which the diagonals ``v = w + j`` are added up. More products than are needed, but
        at the rate of matrix products."""
        height, width = outcome.shape[2:]
        pad = [p for size in reversed(self.padding) for p in (size, size)]
        rows = F.pad(image, pad).flatten(0, 1)  # [B C, H + 2p, W + 2p]
        columns = outcome.flatten(0, 1).mT  # [B C, W, H]
        whole = rows.new_empty(len(rows), width, rows.shape[2])
        step, line, _ = whole.stride()
        diagonals = whole.as_strided((len(rows), width, self.kernel[1]), (step, line + 1, 1))
        found = rows.new_empty(self.kernel[0], len(rows), self.kernel[1])
        for i in range(self.kernel[0]):
            torch.bmm(columns, rows[:, i : i + height], out=whole)
            torch.sum(diagonals, 1, out=found[i])
        return found.transpose(0, 1).reshape(len(image), *value)

    def contract(self, value, a, g, weights, layout, batch_size, into=None):
        if weights is not None:  # of the operand that is smaller
            factors = layout.per_row(weights, g.dim())
            a, g = (a * factors, g) if a.numel() < g.numel() else (a, g * factors)
        image, out = self._operands(a, g, Layout(), batch_size)  # the order of the rows is no matter here
        few = out.device.type == "cpu" and self.groups == 1 and len(out) * out.shape[2:].numel() <= FEW_ROWS
        if few and not (self._pointwise and image.is_contiguous()):  # whose rows would have to be transposed
            rows, cols = (t.flatten(0, 2) for t in self._factors(image, out, len(image)))
            total = products.add_product(None if into is None else into.view(value[0], -1), rows, cols)
            return total.view(value)
        return add_to(into, self._weight_gradient(value, image, out))

    def _weight_gradient(self, value: torch.Size, image: Tensor, out: Tensor) -> Tensor:
        """Summed over all rows, ``[*value]``."""
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


def _summed(each: Tensor, axis: int, mirror: int, size: int, dilation: int, stride: int, n: int) -> Tensor:
    """The sum of windows of n along two axes, which move together along the kernel."""
    total: Tensor | None = None
    for start in range(0, size * dilation, dilation):
        at = [slice(None)] * each.dim()
        at[axis] = at[mirror] = slice(start, start + stride * (n - 1) + 1, stride)
        window = each[tuple(at)]
        total = window.clone() if total is None else total.add_(window)
    assert total is not None
    return total
