"""Gaussian noise, once per logical step, in float32 or better.

On a CPU it comes from the cipher of ``core/noise.py``, which is faster there than JAX's generator: the same
key and names give the same noise as in PyTorch. On other devices and on meshes it is drawn where the sums
lie: each device draws its own shards, which are the same however many there are.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from dptrain.core import noise as on_host
from dptrain.core.entropy import Key

from .uses import accumulated


def noisy_mean(sums: Any, noise_stddev: float, batch_size: float, key: Key, donate: bool = False) -> Any:
    """``(sum + N(0, noise_stddev^2)) / batch_size`` for every element of every leaf.

    Args:
        sums: a tree of arrays in float32 or better.
        noise_stddev: sigma C, in units of the gradient.
        batch_size: L.
        key: used for this step's noise and nothing else.
        donate: whether the sums' buffers may be taken.

    Raises:
        TypeError: a sum is of a narrower type.
    """
    for leaf in jax.tree.leaves(sums):
        if accumulated(leaf.dtype) != leaf.dtype:
            raise TypeError(f"noise would be drawn in {leaf.dtype}: float32 at least.")
    if all(_is_on_a_cpu_by_itself(leaf) for leaf in jax.tree.leaves(sums)):
        return _from_the_cipher(sums, noise_stddev, batch_size, key)
    draw = _drawn_donated if donate else _drawn
    # Whoever has switched it off would have each device draw the whole of a leaf for the sake of its shard.
    with jax.threefry_partitionable(True):
        return draw(sums, noise_words(key), noise_stddev, batch_size)


def _is_on_a_cpu_by_itself(x: Array) -> bool:
    """A mesh of one device draws what a mesh of many draws."""
    devices = x.devices()
    one = len(devices) == 1 and not isinstance(x.sharding, NamedSharding)
    return one and next(iter(devices)).platform == "cpu"


def _from_the_cipher(sums: Any, stddev: float, batch_size: float, key: Key) -> Any:
    paths, tree = jax.tree.flatten_with_path(sums)
    names = unique_names([path for path, _ in paths])
    given = {name: np.ascontiguousarray(x) for name, (_, x) in zip(names, paths)}
    out = {name: np.empty_like(x) for name, x in given.items()}
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    on_host.noisy_mean(given, out, stddev, batch_size, key, threads)
    # Not committed to the device, as what jit hands on is not: it would be compiled for both.
    with jax.default_device(next(iter(paths[0][1].devices()))):
        return jax.tree.unflatten(tree, [jnp.asarray(out[name]) for name in names])


def unique_names(paths: list) -> list[str]:
    """A name for each leaf, of which no two are the same: two leaves of one name would get the same noise.

    Plain names where they tell all leaves apart ("layer.weight", as PyTorch calls them), else JAX's own.
    """
    for simple in (True, False):
        options = {"simple": True, "separator": "."} if simple else {}
        names = [jax.tree_util.keystr(path, **options) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} {number}" for number, name in enumerate(names)]


def noise_words(key: Key) -> np.ndarray:
    """The data of JAX's key for this key: threefry's, which holds 64 bits."""
    return np.frombuffer(key.cipher_key()[:8], dtype=np.uint32)


def _noisy(sums: Any, words: Array, noise_stddev: Array, batch_size: Array) -> Any:
    """Each leaf has a key of its own and each element a place in its stream, so that the noise of a sharded
    leaf is the same on any number of devices, and each draws its own shard."""
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    leaves, tree = jax.tree.flatten(sums)
    drawn = [
        (total + noise_stddev * gaussian(jax.random.fold_in(key, i), total.shape, total.dtype)) / batch_size
        for i, total in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, drawn)


# Noise and batch size are traced numbers, so that a schedule of either compiles nothing again.
_drawn = jax.jit(_noisy)
_drawn_donated = jax.jit(_noisy, donate_argnums=0)


def gaussian(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Standard normal numbers by the transform of Box and Muller (1958), each from bits of its own place.

    Of the two numbers that the transform gives, only the cosine's is used: the other's place may be on
    another device. The radius comes from 64 random bits, of which the lower 32 count only where the upper
    ones are few: so it ends at sqrt(-2 ln 2^-65) = 9.49, where ``jax.random.normal`` in float32, from 23
    bits, ends at 5.4. What that means for delta is in docs/noise.md.
    """
    upper, lower, angle = (
        jax.random.bits(k, shape, jnp.uint32).astype(dtype) for k in jax.random.split(key, 3)
    )
    radius = jnp.sqrt(-2 * jnp.log(upper * 2.0**-32 + (lower * 2.0**-64 + 2.0**-65)))
    turn = 2 * jnp.pi * (angle * 2.0**-32)
    return radius * jnp.cos(turn)
