"""JAX Privacy (https://github.com/google-deepmind/jax_privacy): gradients under ``vmap``, clipped and added.

The masked ("DP") and the naive ("private-mini") training loops of the literature take the same step where
physical batches have one shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax_privacy

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
