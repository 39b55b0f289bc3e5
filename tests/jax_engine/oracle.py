"""The float64 oracle: the gradient of every example by itself, clipped and added."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def clipped_sum(loss, params: Any, batch: Any, clip_norm: float, mask=None, others: tuple = ()) -> tuple:
    """(sum, norms, losses) of single examples, one after another, without any of the engine."""
    size = len(jax.tree.leaves(batch)[0])
    gradient = jax.jit(jax.value_and_grad(loss))
    total = jax.tree.map(jnp.zeros_like, params)
    norms, losses = [], []
    for b in range(size):
        if mask is not None and not mask[b]:
            norms.append(0.0)
            losses.append(0.0)
            continue
        value, g = gradient(params, jax.tree.map(lambda x: x[b], batch), *others)  # noqa: B023
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(g)))
        factor = min(1.0, clip_norm / float(norm))
        total = jax.tree.map(lambda t, x: t + factor * x, total, g)  # noqa: B023
        norms.append(float(norm))
        losses.append(float(value))
    return total, jnp.array(norms), jnp.array(losses)


def relative_error(found: Any, expected: Any) -> float:
    """The norm of the difference over that of what is expected, over the whole tree."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    off = sum(float(jnp.sum(jnp.square(a - b))) for a, b in pairs)
    size = sum(float(jnp.sum(jnp.square(b))) for _, b in pairs)
    return (off / size) ** 0.5 if size else off**0.5
