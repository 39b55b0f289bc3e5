"""Clip factors, in float32 or better whatever the compute type."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax


def clip_factors(squared: Array, mask: Array, clip_norm: float) -> Array:
    """``min(1, C / norm)`` from squared norms; 0 where masked, or where the gradient is not finite."""
    norm = jnp.sqrt(squared)
    factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    return jnp.where(mask & jnp.isfinite(squared), factor, 0.0)


def norm_type(parameters: Sequence[Array]) -> jnp.dtype:
    """In which norms over all parameters are taken: float32, or the widest of theirs."""
    return jnp.result_type(jnp.float32, *(p.dtype for p in parameters if p.dtype.itemsize > 1))


def sum_of_squares(gradients: Sequence[Array], first: int = 0) -> Array:
    """Over all axes from ``first`` on, and over the arrays."""
    return sum(jnp.sum(jnp.square(g), tuple(range(first, g.ndim))) for g in gradients)  # type: ignore


def weighted_sum(factors: Array, gradients: Array) -> Array:
    """``sum_b factors[b] gradients[b]``, as exact as the gradients' type."""
    return jnp.tensordot(factors.astype(gradients.dtype), gradients, 1, precision=lax.Precision.HIGHEST)
