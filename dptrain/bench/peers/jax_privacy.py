"""JAX Privacy (https://github.com/google-deepmind/jax_privacy): gradients under ``vmap``, clipped and added.

The masked ("DP") and the naive ("private-mini") training loops of the literature take the same step where
physical batches have one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import jax_privacy
import optax
from jax_privacy.noise_addition import gaussian_privatizer

from dptrain.bench.contestant import Contestant
from dptrain.bench.jax_engine import with_noise
from dptrain.bench.jax_task import JaxTask

#: ``(params, batch, mask [B] bool) -> gradients``, a tree like params
Step = Callable[[Any, Any, Any], Any]


def contestant(task: JaxTask, mode: str) -> Contestant:
    """Its gradients, with noise and optimizer steps like ours: those it leaves to optax."""
    return with_noise(task, f"jax-privacy {mode}", jax_privacy_step(task.loss, task.clip_norm))


def refuses(error: Exception) -> bool:
    """Never: what ``vmap`` does, it does."""
    return False


def jax_privacy_step(loss: Callable[[Any, Any], Any], clip_norm: float) -> Step:
    """The sum of clipped gradients, without noise.

    Args:
        loss: ``loss(params, example) -> scalar``.
        clip_norm: C, of ``min(1, C / norm)``.
    """
    clipped = jax_privacy.clipped_grad(loss, l2_clip_norm=clip_norm, keep_batch_dim=False)
    return lambda params, batch, mask: clipped(params, batch, is_padding_example=~mask)


class Learnt(Protocol):
    """What is trained: a tree of parameters, the loss of one example, and an optimizer of optax."""

    params: Any
    clip_norm: float
    logical_batch_size: int
    optimizer: optax.GradientTransformation
    noise_key: jax.Array

    def loss(self, params: Any, example: Any) -> Any: ...


class Training:
    """Its gradients and its noise, chained with an optimizer as its examples have it.

    Attributes:
        params: as they are after the releases so far.
    """

    def __init__(self, task: Learnt, mode: str, noise_multiplier: float):
        self.params = task.params
        privatizer = gaussian_privatizer(stddev=noise_multiplier * task.clip_norm, prng_key=task.noise_key)
        size = task.logical_batch_size
        averaged = optax.stateless(lambda sums, params: jax.tree.map(lambda g: g / size, sums))
        self._chain = optax.chain(privatizer, averaged, task.optimizer)
        self._state = self._chain.init(self.params)
        clipped = jax_privacy_step(task.loss, task.clip_norm)
        self._added = jax.jit(
            lambda total, params, batch, mask: jax.tree.map(jnp.add, total, clipped(params, batch, mask))
        )
        self._updated = jax.jit(self._chain.update)
        self._total = self._none = jax.tree.map(jnp.zeros_like, self.params)

    def accumulate(self, batch: Any, mask: Any) -> None:
        """A physical step: the batch's clipped gradients are added to those before."""
        self._total = self._added(self._total, self.params, batch, mask)

    def release(self) -> None:
        """The rest of a logical step: noise and the optimizer."""
        updates, self._state = self._updated(self._total, self._state, self.params)
        self.params, self._total = optax.apply_updates(self.params, updates), self._none
