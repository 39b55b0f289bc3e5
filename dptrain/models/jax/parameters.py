"""Parameters by timm's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

Parameters = dict[str, Array]
Shape = tuple[int, ...]


def initialised(
    shapes: Mapping[str, Shape], key: Array, draw: Callable[[Array, str, Shape], Array]
) -> Parameters:
    """Shifts 0, scales of norms 1, and all others from ``draw(key, name, shape)``."""

    def one(key: Array, name: str, shape: Shape) -> Array:
        if name.endswith("bias"):
            return jnp.zeros(shape)
        return jnp.ones(shape) if "norm" in name else draw(key, name, shape)

    keys = jax.random.split(key, len(shapes))
    return {name: one(k, name, shape) for k, (name, shape) in zip(keys, shapes.items())}
