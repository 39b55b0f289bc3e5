"""Norms of sums of outer products without the sums, and how far they can be off.

``||sum_t r_t c_t^T||_F^2 = <R R^T, C C^T>``: Goodfellow (2015), arXiv 1510.01799, for one position; Li et
al. (2022), arXiv 2110.05679, for sequences. (Both matrices are symmetric, but XLA's products of halves take
longer than that of the whole.)

The terms cancel, so rounding is bounded and not hoped for (rule 7). With ``gamma_n = n u / (1 - n u)``
(Higham 2002, section 3.1, in any order of summation), an entry of R R^T is off by at most
``gamma_R |r_t| |r_s|``, and by Cauchy-Schwarz the inner product of the two by at most

    gamma_R |R|^2 ||C C^T|| + gamma_C |C|^2 ||R R^T|| + gamma_S ||R R^T|| ||C C^T||

in Frobenius norms, with gamma_S of the sum over positions and groups, which is taken axis by axis. To this
comes what is lost where products of small numbers vanish while their partners are large: ``_underflow``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from dptrain.core import precision

from .uses import EXACT, accumulated

#: features are summed by chunks, so that the error grows with the size of one and the number of them; on a
#: CPU the copies that smaller chunks need cost more than the products
CHUNK = 1024
#: what second-order terms and the rounding of the bound itself can come to
SLACK = 1.01
#: the largest error, relative to the squared norm, that is accepted
DOUBT = 0.01


def squared_norms(rows: Array, cols: Array) -> tuple[Array, Array]:
    """Squared norms ``[B]`` of ``sum_t rows[b, e, t] (x) cols[b, e, t]`` and a bound ``[B]`` on their error.

    Args:
        rows: ``[B, E, T, R]``.
        cols: ``[B, E, T, C]``.
    """
    dtype = jnp.promote_types(accumulated(rows.dtype), accumulated(cols.dtype))
    rows, cols = rows.astype(dtype), cols.astype(dtype)
    groups, positions = rows.shape[1:3]
    if positions == 1:
        r2, c2 = (jnp.sum(jnp.square(x), 3) for x in (rows, cols))  # [B, E, T]
        squared = jnp.sum(r2 * c2, (1, 2))
        bound = SLACK * _gamma(rows.shape[3] + cols.shape[3] + groups, dtype) * squared
        return squared, bound + SLACK * _underflow(rows, cols, r2, c2)
    rr, cc = products(rows), products(cols)
    r2, c2 = (jnp.diagonal(x, axis1=2, axis2=3) for x in (rr, cc))  # [B, E, T]
    squared, rr2, cc2 = _total(rr * cc), _total(rr * rr), _total(cc * cc)
    vanished = groups * positions**2 * jnp.finfo(dtype).tiny  # squares of entries
    whole_r, whole_c = jnp.sum(r2, (1, 2)), jnp.sum(c2, (1, 2))
    rr = jnp.minimum(jnp.sqrt(rr2 + vanished), whole_r)  # ||R R^T|| <= |R|^2
    cc = jnp.minimum(jnp.sqrt(cc2 + vanished), whole_c)
    bound = _chunked_gamma(rows.shape[3], dtype) * whole_r * cc
    bound += _chunked_gamma(cols.shape[3], dtype) * whole_c * rr
    bound += _gamma(2 * positions + groups + 8, dtype) * rr * cc
    return squared, SLACK * (bound + _underflow(rows, cols, r2, c2))


def doubtful(squared: Array, bound: Array) -> Array:
    """Where a bound is too large to be accepted; one of 2^60 times the smallest number, with which an example
    without a gradient is left, changes nothing. NaN is no doubt: such an example contributes nothing."""
    return (bound > DOUBT * squared) & (bound > 2.0**60 * jnp.finfo(bound.dtype).tiny)


def products(x: Array) -> Array:
    """``x x^T`` over the last two axes, ``[B, E, T, F] -> [B, E, T, T]``."""
    total = jnp.einsum("betf,besf->bets", x[..., :CHUNK], x[..., :CHUNK], precision=EXACT)
    for start in range(CHUNK, x.shape[-1], CHUNK):
        part = x[..., start : start + CHUNK]
        total += lax.optimization_barrier(jnp.einsum("betf,besf->bets", part, part, precision=EXACT))
    return total


def _underflow(rows: Array, cols: Array, r2: Array, c2: Array) -> Array:
    """A bound ``[B]``: every entry of C C^T, a sum of C products, may be off by C times the smallest normal
    number, and is multiplied by an entry of R R^T; and the other way round. The entries of R R^T add up to at
    most T |R|^2."""
    positions, tiny = rows.shape[2], jnp.finfo(rows.dtype).tiny
    of_rows = (cols.shape[3] * positions * tiny) * jnp.sum(r2, (1, 2))
    return of_rows + (rows.shape[3] * positions * tiny) * jnp.sum(c2, (1, 2))


def _total(block: Array) -> Array:
    """``[B, E, T, T] -> [B]``, one axis at a time: a barrier keeps XLA from adding them all up in one go."""
    for axis in (3, 2, 1):
        block = lax.optimization_barrier(jnp.sum(block, axis))
    return block


def _gamma(terms: int, dtype: jnp.dtype) -> float:
    return precision.gamma(terms, str(jnp.dtype(dtype)))


def _chunked_gamma(features: int, dtype: jnp.dtype) -> float:
    return _gamma(min(features, CHUNK) + -(-features // CHUNK) + 2, dtype)
