"""Gaussian noise, once per logical step, in float32 or better, sharded like what it is added to."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dptrain.core.entropy import Key

from .uses import accumulated


def noise_key(key: Key) -> Array:
    """JAX's key for this key: threefry's, which holds 64 bits.

    Raises:
        TypeError: not a key of ``dptrain.core.entropy``.
    """
    if not isinstance(key, Key):
        raise TypeError("noise needs a dptrain.core.entropy.Key: Key.from_entropy() makes one.")
    words = np.frombuffer(key.cipher_key()[:8], dtype=np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def noisy_mean(sums: Any, noise_stddev: float | Array, batch_size: float | Array, key: Array) -> Any:
    """``(sum + N(0, noise_stddev^2)) / batch_size`` for every element of every leaf.

    Each leaf has a key of its own and each element a place in its stream, so that the noise of a sharded
    leaf is the same on any number of devices, and each draws its own shard.

    Args:
        sums: a tree of float32 or better.
        noise_stddev: sigma C, in units of the gradient.
        batch_size: L.
        key: JAX's, used for this step's noise and nothing else.

    Raises:
        TypeError: a sum is of a narrower type.
    """
    leaves, tree = jax.tree.flatten(sums)
    for leaf in leaves:
        if accumulated(leaf.dtype) != leaf.dtype:
            raise TypeError(f"noise would be drawn in {leaf.dtype}: float32 at least.")
    drawn = [
        (total + noise_stddev * gaussian(jax.random.fold_in(key, i), total.shape, total.dtype)) / batch_size
        for i, total in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)


def gaussian(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Standard normal numbers by the transform of Box and Muller (1958).

    The radius comes from 64 random bits, of which the lower 32 count only where the upper ones are few: so
    it ends at sqrt(-2 ln 2^-65) = 9.49, where ``jax.random.normal`` in float32, from 23 bits, ends
    at 5.4. What that means for delta is in docs/noise.md.
    """
    size = math.prod(shape)
    pairs = (size + 1) // 2
    upper, lower, angle = (
        jax.random.bits(k, (pairs,), jnp.uint32).astype(dtype) for k in jax.random.split(key, 3)
    )
    radius = jnp.sqrt(-2 * jnp.log(upper * 2.0**-32 + (lower * 2.0**-64 + 2.0**-65)))
    turn = 2 * jnp.pi * (angle * 2.0**-32)
    both = jnp.concatenate([radius * jnp.cos(turn), radius * jnp.sin(turn)])
    return both[:size].reshape(shape)
