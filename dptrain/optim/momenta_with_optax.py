"""The optimizers of `momenta`, as transformations of optax: what each computes is said there."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dptrain.optim.momenta import PERIOD


class Kept(NamedTuple):
    """What a momentum remembers: steps taken, and a tree like the parameters."""

    count: jax.Array
    gradients: Any


def _nothing(params: Any) -> Kept:
    return Kept(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))


def scale_by_accumulated_momentum(period: int = PERIOD) -> optax.GradientTransformation:
    """Periodically accumulated momentum."""

    def update(gradient: Any, kept: Kept, params: Any = None) -> tuple[Any, Kept]:
        count = kept.count + 1
        due = count % period == 0
        total = jax.tree.map(jnp.add, kept.gradients, gradient)
        direction = jax.tree.map(lambda g, s: jnp.where(due, g + s / period, g), gradient, total)
        return direction, Kept(count, jax.tree.map(lambda s: jnp.where(due, jnp.zeros_like(s), s), total))

    return optax.GradientTransformation(_nothing, update)


def scale_by_running_momentum() -> optax.GradientTransformation:
    """Running-average momentum."""

    def update(gradient: Any, kept: Kept, params: Any = None) -> tuple[Any, Kept]:
        count = kept.count + 1
        mean = jax.tree.map(lambda a, g: a + ((g - a) / count).astype(a.dtype), kept.gradients, gradient)
        direction = jax.tree.map(lambda g, a: (g / 2 + a / (2 * count)).astype(g.dtype), gradient, mean)
        return direction, Kept(count, mean)

    return optax.GradientTransformation(_nothing, update)
