"""What the engine is measured against: no clipping, the gradient under ``vmap``, one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dptrain.core import clipping_error

from .call import Call
from .factors import clip_factors, norm_type, sum_of_squares, weighted_sum
from .uses import accumulated


def _losses(call: Call) -> Callable:
    def loss(parameters: list, example: list) -> tuple[Array, list]:
        value, *aux = call.loss(parameters, example, call.others)
        return value, aux

    return loss


def non_private(call: Call, mask: Array) -> tuple:
    """The gradient of the sum of losses, without clipping; norms are not known and given as 0."""

    def total(parameters: list) -> tuple[Array, tuple]:
        losses, aux = jax.vmap(_losses(call), (None, 0))(parameters, call.data)
        losses = jnp.where(mask, losses, 0)
        return jnp.sum(losses), (losses, aux)

    (_, (losses, aux)), sums = jax.value_and_grad(total, has_aux=True)(call.parameters)
    return [_wide(g) for g in sums], jnp.zeros_like(losses), losses, aux


def vectorised(clip_norm: float) -> Callable:
    """Per-example gradients by ``vmap(grad)``, the way of most code for JAX."""

    def step(call: Call, mask: Array) -> tuple:
        gradient = jax.value_and_grad(_losses(call), has_aux=True)
        (losses, aux), gradients = jax.vmap(gradient, (None, 0))(call.parameters, call.data)
        gradients = [_wide(g) for g in gradients]
        squared = sum_of_squares(gradients, 1).astype(norm_type(call.parameters))
        factors = clip_factors(
            squared, mask, clip_norm, call.parameters, clipping_error.chain(len(call.parameters))
        )

        def together() -> tuple:
            return [weighted_sum(factors, g) for g in gradients], jnp.sqrt(squared), losses, aux

        return unless_infinite(squared, together, call, mask, clip_norm)

    return step


def unless_infinite(
    squared: Array, together: Callable[[], tuple], call: Call, mask: Array, clip_norm: float
) -> tuple:
    """``together()``, or one example after another where a gradient is not finite.

    Zero times NaN is NaN, so a row that is not finite would spoil whatever is summed with it. And examples
    are not separate under ``vmap`` as far as NaN goes: XLA may compute a grouped convolution, which is
    what the gradient of a kernel becomes, as a dense one with zeros, and hand it from row to row. One
    by one, an example that is not finite loses its own part and nothing else.
    """
    return lax.cond(jnp.all(jnp.isfinite(squared)), together, lambda: looped(clip_norm)(call, mask))


def looped(clip_norm: float) -> Callable:
    """One example after another, each added to the sum as soon as it is clipped."""

    def step(call: Call, mask: Array) -> tuple:
        gradient = jax.value_and_grad(_losses(call), has_aux=True)

        def turn(sums: list, item: tuple) -> tuple:
            example, here = item
            (loss, aux), grads = gradient(call.parameters, example)
            grads = [_wide(g) for g in grads]
            squared = sum_of_squares(grads).astype(norm_type(call.parameters))
            factor = clip_factors(
                squared, here, clip_norm, call.parameters, clipping_error.chain(len(call.parameters))
            )
            sums = [s + jnp.where(factor > 0, factor.astype(g.dtype) * g, 0) for s, g in zip(sums, grads)]
            return sums, (jnp.sqrt(squared), loss, aux)

        start = [jnp.zeros(jnp.shape(p), accumulated(p.dtype)) for p in call.parameters]
        sums, (norms, losses, aux) = lax.scan(turn, start, (call.data, mask))
        return sums, norms, losses, aux

    return step


def in_parts(some: Callable, data: list, mask: Array, rows: int) -> tuple:
    """``some(data, mask) -> (sums, *per example)`` of parts of a batch, ``rows`` examples at a time."""
    size = len(mask)
    if rows >= size:
        return some(data, mask)
    if size % rows:
        raise ValueError(f"rows must divide the physical batch of {size} examples, and is {rows}.")
    split = [x.reshape(size // rows, rows, *x.shape[1:]) for x in (*data, mask)]
    like = jax.eval_shape(some, [x[0] for x in split[:-1]], split[-1][0])[0]
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), like)

    def turn(total: Any, part: list) -> tuple:
        sums, *rest = some(part[:-1], part[-1])
        return jax.tree.map(jnp.add, total, sums), rest

    sums, rest = lax.scan(turn, start, split)
    return sums, *(jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), r) for r in rest)


def _wide(x: Array) -> Array:
    return x.astype(accumulated(x.dtype))
