"""Ways to take a physical step: ``(params, batch, mask) -> gradients``, like the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

import dptrain.jax as dpj

from .cases import Case

Step = Callable[[Any, Any, Array], Any]


def batched(case: Case) -> Step:
    """The gradient of the sum of losses under ``vmap``: how people train in JAX."""

    def step(params: Any, batch: Any, mask: Array) -> Any:
        return jax.grad(lambda p: jnp.sum(jax.vmap(case.loss, (None, 0))(p, batch)))(params)

    return step


def scanned(case: Case, rows: int) -> Step:
    """Gradients of ``rows`` examples at a time, added in a scan."""

    def step(params: Any, batch: Any, mask: Array) -> Any:
        parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batch)

        def turn(total: Any, part: Any) -> tuple[Any, None]:
            if rows == 1:
                part = jax.tree.map(lambda x: x[0], part)
                return jax.tree.map(jnp.add, total, jax.grad(case.loss)(params, part)), None
            return jax.tree.map(jnp.add, total, batched(case)(params, part, mask)), None

        return lax.scan(turn, jax.tree.map(jnp.zeros_like, params), parts)[0]

    return step


def private(case: Case, method: str, clip_norm: float) -> Step:
    """dptrain, by a method of its table."""
    clipped = dpj.clipped_grad(case.loss, clip_norm=clip_norm, method=method)
    return lambda params, batch, mask: clipped(params, batch, mask=mask).grads


def jax_privacy(case: Case, clip_norm: float) -> Step:
    """google-deepmind/jax_privacy, with its mask for padding."""
    import jax_privacy

    function = jax_privacy.clipped_grad
    function = function if callable(function) else function.clipped_grad
    clipped = function(case.loss, l2_clip_norm=clip_norm, keep_batch_dim=False)
    return lambda params, batch, mask: clipped(params, batch, is_padding_example=~mask)


def enter(case: Case, name: str, clip_norm: float) -> Step:
    """A contestant: ``non-private batched``, ``non-private scanned 4``, ``jax-privacy`` or a method."""
    kind, _, how = name.partition(" ")
    if kind == "non-private":
        return batched(case) if how == "batched" else scanned(case, int(how.partition(" ")[2] or 1))
    return jax_privacy(case, clip_norm) if name == "jax-privacy" else private(case, name, clip_norm)
