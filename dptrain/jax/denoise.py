"""DiSK, a Kalman filter over private gradients: equations and privacy are in `dptrain.core.denoising`.

Pure functions, which a compiled step may call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dptrain.core.denoising import filtered_variance

from .release import PrivateGradient


class Filtered(NamedTuple):
    """What the filter remembers: the weights before the last step, its estimate of the gradient, the variance
    of that one's noise in each coordinate, and how many gradients it has filtered."""

    previous: Any
    estimate: Any
    noise_variance: Array
    taken: Array


def begin(params: Any) -> Filtered:
    """Before the first step from ``params``."""
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    return Filtered(
        jax.tree.map(jnp.copy, params), zeros, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    )


def ahead(params: Any, kept: Filtered, kappa: float) -> Any:
    """The look-ahead point y_t, where the examples' gradients are to be taken."""
    return jax.tree.map(lambda x, before: before + (x - before) / kappa, params, kept.previous)


def filtered(
    gradient: PrivateGradient, params: Any, kept: Filtered, kappa: float
) -> tuple[PrivateGradient, Filtered]:
    """g_t of p_t, the private gradient at the look-ahead point, and what to remember.

    Raises:
        ValueError: the gradient's noise is not known.
    """
    measured = gradient.noise_variance
    if measured is None:
        raise ValueError("a filter takes gradients as privatize released them, whose noise is known.")
    weight = jnp.where(kept.taken == 0, 1.0, kappa)
    estimate = jax.tree.map(
        lambda old, new: (old + weight * (new - old)).astype(old.dtype), kept.estimate, gradient.grads
    )
    variance = filtered_variance(kept.noise_variance, measured, weight)
    return (
        gradient.map(lambda _: estimate, variance),
        Filtered(params, estimate, jnp.asarray(variance, kept.noise_variance.dtype), kept.taken + 1),
    )
