"""Norms of outer-product gradients without the gradients, and how far they can be off.

``||sum_t r_t c_t^T||_F^2 = <R R^T, C C^T>`` for each example: Goodfellow (2015), arXiv 1510.01799
for one position; Li et al. (2022), arXiv 2110.05679 for sequences. Both matrices are symmetric, so
only blocks on and below their diagonals are formed.

The terms cancel, so rounding is bounded and not hoped for (rule 7). With ``gamma_n = n u / (1 - n u)``
(Higham 2002, section 3.1, in any order of summation), an entry of R R^T is off by at most
``gamma_R |r_t| |r_s|``, and by Cauchy-Schwarz the inner product of the two by at most

    gamma_R |R|^2 ||C C^T|| + gamma_C |C|^2 ||R R^T|| + gamma_S ||R R^T|| ||C C^T||

in Frobenius norms, gamma_S being that of the summation over positions, which is done in float64.

Products below the smallest normal number t may vanish while their partners are large. An entry of R R^T is
then off by R t, and the entries of C C^T add up to at most T |C|^2: ``underflow``. The Frobenius norms in the
bound itself, taken of squares of entries, are understated by sqrt(T T t) at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dptrain.core import precision

from .base import widen

#: features are summed by chunks, so that the error grows with the size of one and the number of them
CHUNK = 256
#: rows of blocks for the lower triangle: (1 + 1/3) / 2 of the products
BLOCKS = 3
#: positions from which blocks pay for themselves
SMALLEST_BLOCK = 32
#: bytes of a row of blocks, for all examples
BLOCK_BYTES = 64 * 2**20
#: the largest error, relative to the squared norm, that is accepted
DOUBT = 0.01
#: what second-order terms and the rounding of the bound itself can come to
SLACK = 1.01


def gamma(terms: int, dtype: torch.dtype) -> float:
    """``core.precision.gamma`` for a torch type; infinite where it bounds nothing."""
    try:
        return precision.gamma(terms, str(dtype).removeprefix("torch."))
    except ValueError:
        return math.inf


def chunked_gamma(features: int, dtype: torch.dtype) -> float:
    """Of a sum over ``features`` taken by ``products``."""
    return gamma(min(features, CHUNK) + -(-features // CHUNK) + 2, dtype)


def products(left: Tensor, right: Tensor) -> Tensor:
    """``left right^T`` over the last two axes, ``[..., T, F], [..., S, F] -> [..., T, S]``."""
    total = left[..., :CHUNK] @ right[..., :CHUNK].mT
    if left.shape[-1] > CHUNK:
        flat, left, right = (t.flatten(0, -3) for t in (total, left, right))
        for start in range(CHUNK, left.shape[-1], CHUNK):
            flat.baddbmm_(left[..., start : start + CHUNK], right[..., start : start + CHUNK].mT)
    return total


def squared_norms(rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms ``[B]`` of ``sum_t rows[b, e, t] (x) cols[b, e, t]`` and a bound ``[B]`` on their error.

    Args:
        rows: ``[B, E, T, R]``.
        cols: ``[B, E, T, C]``.
    """
    rows, cols = widen(rows), widen(cols)
    examples, groups, positions = rows.shape[:3]
    dtype = rows.dtype
    r2, c2 = rows.square().sum(3), cols.square().sum(3)  # [B, E, T]
    if positions == 1:
        squared = (r2 * c2).sum((1, 2))
        bound = SLACK * gamma(rows.shape[3] + cols.shape[3] + groups, dtype) * squared
        return squared, bound + underflow(
            r2.sum((1, 2)), c2.sum((1, 2)), rows.shape[3], cols.shape[3], groups
        )
    squared, rr2, cc2 = (rows.new_zeros(examples, dtype=torch.float64) for _ in range(3))
    for start, stop in _blocks(positions, positions * examples * groups * rows.element_size()):
        rr = products(rows[:, :, start:stop], rows[:, :, :stop])
        cc = products(cols[:, :, start:stop], cols[:, :, :stop])
        rr2 += _mirrored(row_squares, rr, start)
        cc2 += _mirrored(row_squares, cc, start)
        squared += _mirrored(total, rr.mul_(cc), start)
    bound = error_bound(
        r2.sum((1, 2)),
        c2.sum((1, 2)),
        rr2,
        cc2,
        chunked_gamma(rows.shape[3], dtype),
        chunked_gamma(cols.shape[3], dtype),
        groups * positions**2,
    ) + underflow(r2.sum((1, 2)), c2.sum((1, 2)), rows.shape[3], cols.shape[3], groups * positions**2)
    return squared.to(dtype), bound


def doubtful(squared: Tensor, bounds: Tensor) -> Tensor:
    """Where bounds on the error of squared norms are too large to be accepted.

    They are added to the norms. Those of 2^60 times the smallest number, which is what an example without
    a gradient is left with, change nothing there.
    """
    noticed = bounds > 2.0**60 * torch.finfo(bounds.dtype).tiny
    return (bounds > DOUBT * squared) & squared.isfinite() & noticed


def error_bound(
    r2: Tensor,
    c2: Tensor,
    rr2: Tensor,
    cc2: Tensor,
    row_gamma: float,
    col_gamma: float,
    terms: int,
) -> Tensor:
    """The bound of this module, ``[B]``; infinite where something is not finite.

    Args:
        r2, c2: ``|R|^2`` and ``|C|^2``, ``[B]``.
        rr2, cc2: squared Frobenius norms of the two matrices.
        row_gamma, col_gamma: of the sum over features behind an entry of either.
        terms: of the inner product, which are added in float64.
    """
    dtype = r2.dtype
    vanished = terms * torch.finfo(dtype).tiny
    rr = torch.minimum((rr2 + vanished).sqrt().to(dtype), r2)  # ||R R^T|| <= |R|^2
    cc = torch.minimum((cc2 + vanished).sqrt().to(dtype), c2)
    bound = row_gamma * r2 * cc
    bound += col_gamma * c2 * rr
    bound += (gamma(4, dtype) + gamma(terms, torch.float64)) * rr * cc
    return (SLACK * bound).nan_to_num(nan=math.inf)


def underflow(r2: Tensor, c2: Tensor, row_terms: int, col_terms: int, terms: int) -> Tensor:
    """What a squared norm can miss because products vanished, ``[B]``.

    Args:
        r2, c2: ``|R|^2`` and ``|C|^2``, ``[B]``.
        row_terms, col_terms: features that an entry of either matrix sums over.
        terms: of the inner product of the matrices.
    """
    tiny = torch.finfo(r2.dtype).tiny
    # twice, for what vanished from |R|^2 and |C|^2 themselves
    by_entries = 2 * math.sqrt(terms) * (row_terms * tiny * c2 + col_terms * tiny * r2)
    return (by_entries + terms * tiny).nan_to_num(nan=math.inf)


def _blocks(positions: int, bytes_per_row: int) -> list[tuple[int, int]]:
    """(start, stop) of rows of blocks."""
    step = -(-positions // BLOCKS // 16) * 16 if positions >= BLOCKS * SMALLEST_BLOCK else positions
    step = max(1, min(step, BLOCK_BYTES // bytes_per_row))
    return [(start, min(start + step, positions)) for start in range(0, positions, step)]


def _mirrored(reduce: Callable[[Tensor], Tensor], block: Tensor, start: int) -> Tensor:
    """A sum over part ``[B, E, rows, :stop]`` of a symmetric matrix: entries left of the diagonal block count
    for their mirror images as well."""
    return reduce(block) + reduce(block[..., :start]) if start else reduce(block)


def total(block: Tensor) -> Tensor:
    """The sum of ``[B, E, T, S]`` for each example, in float64."""
    return block.sum((1, 2, 3), dtype=torch.float64)


def row_squares(block: Tensor) -> Tensor:
    """The sum of squares likewise: a row's in the type of the block, which only rows of millions outgrow."""
    return torch.linalg.vector_norm(block, dim=3).double().square().sum((1, 2))
