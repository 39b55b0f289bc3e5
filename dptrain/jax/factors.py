"""Clip factors, in float32 or better whatever the compute type."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from dptrain.core import clipping_error
from dptrain.core.clip_rules import LEAST_CLIP_NORM, ClipRule
from dptrain.core.clipping_error import LEVEL

from .call import Call


def factors_by_part(
    rule: ClipRule, squared: Sequence[Array], mask: Array, call: Call, parts: int
) -> list[Array]:
    """Clip factors for each part of the rule; 0 in all where the gradient is not finite in one.

    Args:
        squared: squared norms over the parameters of each part; mask and parts as for ``clip_factors``.
        call: with the thresholds that count. Those of the rule may be others: what is compiled for one rule
            serves all of its kind.
    """
    for each in squared if len(squared) > 1 else ():
        mask = mask & jnp.isfinite(each)
    return [
        clip_factors(each, mask, call.thresholds[part], call.parameters, parts, rule.stability)
        for part, each in enumerate(squared)
    ]


def clip_factors(
    squared: Array,
    mask: Array,
    clip_norm: Array,
    parameters: Sequence[Array],
    parts: int,
    stability: float | None = None,
) -> Array:
    """``min(1, C / norm)``, a hair less so that rounding never lets a norm exceed C (how much a hair is:
    ``core/clipping_error.py``), with a stability ``C / (norm + stability)``; 0 where masked, or where the
    gradient is not finite.

    Args:
        squared: squared norms over all parameters, by ``sum_of_squares``.
        parts: additions that follow each other when the norms of parts are added.
    """
    norm = jnp.sqrt(squared)
    elements = sum(p.size for p in parameters)
    narrowest = min(jnp.dtype(norm_type([p])).name for p in parameters)  # "float32" < "float64"
    # What is compiled serves every clip norm from the least on.
    margin = clipping_error.margin(narrowest, elements, parts, LEAST_CLIP_NORM, clipping_error.LEVELS)
    limit = clip_norm.astype(norm.dtype) * margin
    if stability is None:
        factor = jnp.minimum(1.0, limit / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny))
    else:
        factor = limit / (norm + stability)
    return jnp.where(mask & jnp.isfinite(squared), factor, 0.0)


def whole(squared: Sequence[Array]) -> Array:
    """Squared norms over all parameters, of those by part of the clip rule."""
    return squared[0] if len(squared) == 1 else jnp.sum(jnp.stack(squared), 0)


def norm_type(parameters: Sequence[Array]) -> jnp.dtype:
    """In which norms over all parameters are taken: float32, or the widest of theirs."""
    return jnp.result_type(jnp.float32, *(p.dtype for p in parameters if p.dtype.itemsize > 1))


def sum_of_squares(gradients: Sequence[Array], first: int = 0) -> Array:
    """Over all axes from ``first`` on, and over the arrays.

    By blocks, and those by blocks: how XLA adds up a long axis is its own affair, and one square after the
    other, in float32, the sum of millions of them would swallow the small ones.
    """
    return total([_by_levels(jnp.square(g).reshape(*g.shape[:first], -1)) for g in gradients])


def total(parts: Sequence[Array]) -> Array:
    """The sum of arrays of one shape, by blocks."""
    if len(parts) == 1:
        return parts[0]
    return _by_levels(jnp.stack([x.astype(jnp.result_type(*parts)) for x in parts], -1))


def _by_levels(x: Array) -> Array:
    """The sum over the last axis."""
    while (size := x.shape[-1]) > LEVEL:
        whole = size - size % LEVEL
        sums = jnp.sum(x[..., :whole].reshape(*x.shape[:-1], -1, LEVEL), -1)
        if whole < size:
            sums = jnp.concatenate([sums, jnp.sum(x[..., whole:], -1, keepdims=True)], -1)
        x = lax.optimization_barrier(sums)  # or the compiler might add them all up in one go
    return jnp.sum(x, -1)


def weighted_sum(factors: Array, gradients: Array) -> Array:
    """``sum_b factors[b] gradients[b]``, as exact as the gradients' type."""
    return jnp.tensordot(factors.astype(gradients.dtype), gradients, 1, precision=lax.Precision.HIGHEST)
