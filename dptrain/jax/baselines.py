"""What the engine is measured against: no clipping, the gradient under ``vmap``, one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dptrain.core import clipping_error
from dptrain.core.clip_rules import ClipRule

from .call import Call
from .factors import factors_by_part, norm_type, sum_of_squares, weighted_sum, whole
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


def _squared_by_part(rule: ClipRule, call: Call, gradients: list[Array], first: int) -> list[Array]:
    """Squared norms over the parameters of each part of the rule; the axes before ``first`` are examples."""
    part_of = rule.partition(call.names)
    nothing = jnp.zeros((call.size,) * first)
    found = [[g for g, its in zip(gradients, part_of) if its == part] for part in range(len(rule.thresholds))]
    kind = norm_type(call.parameters)
    return [(sum_of_squares(mine, first) if mine else nothing).astype(kind) for mine in found]


def vectorised(rule: ClipRule) -> Callable:
    """Per-example gradients by ``vmap(grad)``, the way of most code for JAX."""

    def step(call: Call, mask: Array) -> tuple:
        gradient = jax.value_and_grad(_losses(call), has_aux=True)
        (losses, aux), gradients = jax.vmap(gradient, (None, 0))(call.parameters, call.data)
        gradients = [_wide(g) for g in gradients]
        by_part = _squared_by_part(rule, call, gradients, 1)
        squared, joined = whole(by_part), clipping_error.chain(len(call.parameters))
        factors = factors_by_part(rule, by_part, mask, call, joined)
        part_of = rule.partition(call.names)

        sums = [weighted_sum(factors[part], g) for part, g in zip(part_of, gradients)]
        return unless_infinite((sums, jnp.sqrt(squared), losses, aux), call, mask, rule)

    return step


def unless_infinite(found: tuple, call: Call, mask: Array, rule: ClipRule) -> tuple:
    """``found``, or what one example after another gives where a gradient is not finite.

    Args:
        found: sums, norms, losses, aux.

    Zero times NaN is NaN, so a row that is not finite would spoil whatever is summed with it. And examples
    are not separate under ``vmap`` as far as NaN goes: XLA may compute a grouped convolution, which is
    what the gradient of a kernel becomes, as a dense one with zeros, and hand it from row to row. One
    by one, an example that is not finite loses its own part and nothing else.
    """

    def again(_: tuple) -> tuple:
        return jnp.array(True), *looped(rule)(call, mask)

    # A loop and not a branch: what goes through a loop stays where it lies.
    return lax.while_loop(lambda state: ~state[0], again, (jnp.all(jnp.isfinite(found[1])), *found))[1:]


def looped(rule: ClipRule) -> Callable:
    """One example after another, each added to the sum as soon as it is clipped."""

    def step(call: Call, mask: Array) -> tuple:
        gradient = jax.value_and_grad(_losses(call), has_aux=True)
        part_of, joined = rule.partition(call.names), clipping_error.chain(len(call.parameters))

        def turn(sums: list, item: tuple) -> tuple:
            example, here = item
            (loss, aux), grads = gradient(call.parameters, example)
            grads = [_wide(g) for g in grads]
            by_part = _squared_by_part(rule, call, grads, 0)
            factors = factors_by_part(rule, by_part, here, call, joined)
            weights = [factors[part] for part in part_of]
            sums = [s + jnp.where(w > 0, w.astype(g.dtype) * g, 0) for s, w, g in zip(sums, weights, grads)]
            return sums, (jnp.sqrt(whole(by_part)), loss, aux)

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
