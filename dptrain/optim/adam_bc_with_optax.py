"""`adam_bc` as a transformation of optax: what it computes is said there."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dptrain.optim.adam_bc import BETAS, EPS, FLOOR, UNKNOWN_NOISE


def scale_by_adam_bc(floor: float = FLOOR) -> optax.GradientTransformationExtraArgs:
    """Adam without the bias of private noise; its update needs ``noise_variance``, as `dptrain.jax.private`
    gives it.

    Raises (from ``update``):
        ValueError: the variance is not known.
    """
    b1, b2 = BETAS

    def init(params: Any) -> optax.ScaleByAdamState:
        mean, square = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))  # each may be given away
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mean, square)

    def update(
        gradient: Any,
        state: optax.ScaleByAdamState,
        params: Any = None,
        *,
        noise_variance: float | jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Any, optax.ScaleByAdamState]:
        if noise_variance is None:
            raise ValueError(UNKNOWN_NOISE)
        count = state.count + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradient)
        square = jax.tree.map(  # in its own type, whatever that of the variance is
            lambda v, g: (b2 * v + (1 - b2) * (g * g - noise_variance)).astype(v.dtype), state.nu, gradient
        )

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            root = jnp.sqrt(jnp.maximum(v / (1 - b2**count), floor * noise_variance))
            return (m / (1 - b1**count) / (root + EPS)).astype(m.dtype)

        return jax.tree.map(direction, mean, square), optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformationExtraArgs(init, update)
