"""A search for a gradient that rounding lets through longer than C. (Rule 7: by derivation, not by luck.)

Exact norms are sums of squares of float32 numbers, which float64 holds exactly, by ``math.fsum``; Gram norms
are compared with rational arithmetic.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import dptrain.torch as dpt
from dptrain.core import clipping_error, methods
from dptrain.torch.bookkeeping import clip_factors, total_of
from dptrain.torch.traced import _squared_norm as traced_squared_norm
from dptrain.torch.uses import gram
from dptrain.torch.uses.base import squared_norm

SIZES = [1, 7, 127, 128, 129, 1000, 10_007]
LARGE = [10**5, 10**6]
PRIVATE = [row.name for row in methods.TABLE if row.is_private]


def exact_square(row: torch.Tensor) -> Fraction:
    """To a relative 2^-53."""
    values = row.double().numpy()
    return Fraction(math.fsum(values * values))


def excess(row: torch.Tensor, factor: torch.Tensor, clip_norm: float) -> float:
    """By how much ``factor`` times the row is longer than C, relatively; never above 0, it is claimed."""
    length = Fraction(float(factor)) ** 2 * exact_square(row)
    return float(length / Fraction(clip_norm) ** 2 - 1) / 2


def losing(size: int, generator: torch.Generator) -> torch.Tensor:
    """A few large numbers, and small ones whose squares are a little less than half of their last digit: one
    after the other, all of them vanish."""
    row = torch.full((size,), 2.0**-12 * math.sqrt(0.49999))
    row[:: int(torch.randint(8, 200, (), generator=generator))] = 1.0
    return row


def equal(size: int, generator: torch.Generator) -> torch.Tensor:
    """One number, of a thousand the one whose square loses most in rounding."""
    some = 1 + torch.rand(1000, generator=generator)
    lost = some.double().square() - some.square().double()
    return some[lost.argmax()].expand(size).clone()


def decades(size: int, generator: torch.Generator) -> torch.Tensor:
    return (
        10.0 ** (8 * torch.rand(size, generator=generator) - 4)
        * torch.randn(size, generator=generator).sign()
    )


def normal(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator)


def coarse(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(size, generator=generator).bfloat16().float()


KINDS = [losing, equal, decades, normal, coarse]
#: norms, as multiples of C
NORMS = [0.3, 1 - 1e-6, 1.0, 1 + 1e-7, 1 + 1e-5, 3.0, 1e6]
SCALES = [1.0, 1e-12, 1e-9, 1e15]


def worst(norm=squared_norm, sizes=SIZES, seeds=range(1)) -> float:
    """The largest excess that is found."""
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for size in sizes:
            for kind in KINDS:
                row = kind(size, generator)
                row = row / float(exact_square(row)) ** 0.5
                for clip_norm in SCALES:
                    rows = torch.stack([row * (n * clip_norm) for n in NORMS])
                    factors = clip_factors(total_of([norm(rows)]), clip_norm, size, 1)
                    found += [excess(r, f, clip_norm) for r, f in zip(rows, factors)]
    return max(found)


def test_no_materialised_gradient_is_longer_than_the_clip_norm():
    assert worst() <= 0
    assert worst(traced_squared_norm, [129, 1000, 4096]) <= 0


@pytest.mark.slow
def test_no_large_gradient_is_longer_than_the_clip_norm():
    assert worst(sizes=LARGE) <= 0 and worst(traced_squared_norm, LARGE) <= 0
    assert worst(seeds=range(1, 20)) <= 0


def test_the_search_finds_what_the_margin_prevents(monkeypatch):
    monkeypatch.setattr(clipping_error, "margin", lambda *_: 1.0)
    assert worst(sizes=[127, 1000]) > 1e-7


def test_many_parts_are_added_up_as_exactly():
    """Three hundred small parts after a large one, each less than half of its last digit."""
    parts = [torch.ones(1), *[torch.full((1,), 2.0**-24 * 0.999)] * 300]
    row = torch.cat(parts).double().sqrt()
    factor = clip_factors(total_of(parts), 0.5, 301, 301)
    assert float(factor) * float(row.norm()) <= 0.5


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-19, 1e-12])
def test_what_vanishes_when_squared_is_short_enough(scale):
    """Far below and around the square root of the smallest number, with the smallest clip norm."""
    for size in (1, 1000, 10**5):
        row = torch.full((1, size), scale)
        factor = clip_factors(total_of([squared_norm(row)]), 1e-12, size, 1)
        assert excess(row[0], factor[0], 1e-12) <= 0


def test_norms_that_overflow_are_not_clipped_but_left_out():
    row = torch.full((1, 10), 3e19)
    assert clip_factors(total_of([squared_norm(row)]), 1.0, 10, 1) == 0


# ---- Gram norms


def exact_gram(rows: torch.Tensor, cols: torch.Tensor) -> Fraction:
    """``||sum_t rows_t (x) cols_t||^2`` in rational arithmetic; ``[T, R]`` and ``[T, C]``."""
    r, c = (np.array([[Fraction(x) for x in row] for row in m.tolist()], dtype=object) for m in (rows, cols))
    return sum(x * x for x in (r.T @ c).flatten())


def operands(positions: int, seed: int):
    """Pairs of factors ``[T, R]``, ``[T, C]`` that cancel to the share of the seed, or are of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    rows, cols = draw(positions, 5), draw(positions, 6)
    yield rows, cols
    yield rows.bfloat16().float(), cols.bfloat16().float()
    sign = torch.tensor([1.0, -1.0]).repeat(positions)[:positions, None]
    for share in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0):
        yield sign * rows[:1] + share * rows, cols[:1] + share * cols
    for small in (1e-5, 1e-12, 1e-19, 1e-20, 1e-21, 1e-22, 1e-23, 1e-25, 1e-30, 1e-38, 1e-42):
        for large in (1.0, 1e5, 1e12, 1e17, 1e18, 1e19):
            yield small * rows, large * cols
            yield large * rows, small * cols
            yield small * (sign * rows[:1] + 1e-3 * rows), large * (cols[:1] + 1e-3 * cols)


@pytest.mark.parametrize("positions", [1, 2, 9])
def test_gram_norms_are_never_understated(positions):
    """By more than their margin and the smallest squares, unless the bound says that they are in doubt."""
    doubtful = 0
    for rows, cols in operands(positions, 0):
        squared, bound = (float(x) for x in gram.squared_norms(rows[None, None], cols[None, None]))
        if not math.isfinite(squared) or bound > 0.01 * squared:
            doubtful += 1
            continue
        truth = exact_gram(rows, cols)
        padded = Fraction(float(np.float32(squared) + np.float32(bound)))
        lost = Fraction(clipping_error.shortfall("float32", 30, 1, clipping_error.GRAM))
        assert truth * (1 - lost) <= padded + 30 * Fraction(2) ** -126, (rows, cols)
    assert doubtful  # all of which are materialised


def test_without_its_bound_a_gram_norm_is_understated():
    """What the search can see: by a hundredth where terms cancel, by all of it where products vanish."""
    found = []
    for rows, cols in operands(9, 0):
        squared, _ = gram.squared_norms(rows[None, None], cols[None, None])
        truth = float(exact_gram(rows, cols))
        if float(squared) < 1e30 and truth > 1e-20:
            found.append(float(squared) / truth)
    assert min(found) < 0.1 and sum(0.5 < f < 1 - 1e-4 for f in found) > 0


# ---- the whole way


class Cancelling(nn.Module):
    """Positions whose gradients all but cancel, a bias, a scale and a table."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.table = nn.Embedding(7, 12)

    def forward(self, x, tokens):
        sign = torch.tensor([1.0, -1.0], dtype=x.dtype).repeat(4).unsqueeze(1)
        y = self.layer(x + self.table(tokens).to(x.dtype)) * self.scale
        return (y * sign).sum((1, 2)) + 1e-3 * y.square().sum((1, 2))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("method", PRIVATE)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "tf32"])
def test_no_example_moves_the_sum_by_more_than_the_clip_norm(method, precision):
    """What comes out for one example at a time, whatever the model computes in."""
    torch.manual_seed(0)
    model = Cancelling()
    x = torch.randn(6, 1, 12).repeat(1, 8, 1) + 1e-2 * torch.randn(6, 8, 12)
    batch = x * 10.0 ** torch.arange(-2.0, 4.0).reshape(6, 1, 1), torch.randint(7, (6, 8))

    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            return model(*batch).float()

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "tf32" else "highest")  # on a CPU bfloat16
    try:
        clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.7, method=method)
        longest = 0.0
        for b in range(6):
            out = clipped(batch, torch.arange(6) == b)
            length = sum((exact_square(g.flatten()) for g in out.grads.values()), Fraction(0))
            assert length <= Fraction(0.7) ** 2
            longest = max(longest, float(length) ** 0.5 / 0.7)
        assert longest > 0.99
    finally:
        torch.set_float32_matmul_precision(before)


def test_examples_with_next_to_no_gradient_are_in_no_doubt():
    """Or masked rows would have every batch materialised, and compiled steps be thrown away."""
    torch.manual_seed(0)
    rows, cols = torch.randn(5, 1, 50, 64), 10 * torch.randn(5, 1, 50, 64)
    rows *= torch.tensor([0.0, 1e-12, 1e-8, 1e-4, 1.0]).reshape(5, 1, 1, 1)
    for positions in (1, 50):
        squared, bound = gram.squared_norms(rows[:, :, :positions], cols[:, :, :positions])
        assert not gram.doubtful(squared, bound).any()
        assert (bound <= 0.002 * squared)[2:].all()
