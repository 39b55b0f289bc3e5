"""The noise of consecutive steps of a mechanism whose noise is correlated (``core/correlated.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from dptrain.core.correlated import NoiseChain
from dptrain.core.entropy import Key
from dptrain.core.spec import StepSpec

from .noise import noisy_mean


class CorrelatedNoise(NoiseChain):
    """Noise for sums that are trees of arrays; as of ``NoiseChain``."""

    def __init__(
        self,
        coefficients: tuple[float, ...],
        taken: int = 0,
        key_of: Callable[[int], Key] | None = None,
    ):
        super().__init__(coefficients, taken, key_of)
        first, *others = self.coefficients

        def combined(drawn: Any, earlier: tuple) -> Any:
            for c, noise in zip(others, earlier):
                drawn = jax.tree.map(lambda z, n, c=c: z - c * n, drawn, noise)
            return jax.tree.map(lambda z: z / first, drawn)

        self._combined = jax.jit(combined)

    def next(self, like: Any, spec: StepSpec, key: Key) -> Any:
        """Z_t / L, a tree like the sum.

        Args:
            like: what it will be added to, float32 or better; on a mesh the noise lies where that does.
            spec: of the step.
            key: the step's own, used for W_t and nothing else.
        """

        def drawn(key: Key) -> Any:
            zeros = jax.tree.map(_zeros, like)
            found = noisy_mean(zeros, spec.noise_stddev, spec.expected_batch_size, key, donate=True)
            return self._combined(found, tuple(self._earlier))

        return self._next(key, drawn)


def _zeros(x: Array) -> Array:
    """In shards where it is; else not committed to a device, or what follows is compiled for both."""
    where = x.sharding if isinstance(x.sharding, NamedSharding) else None
    return jnp.zeros(x.shape, x.dtype, device=where)
