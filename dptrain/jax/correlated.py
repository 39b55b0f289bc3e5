"""The noise of consecutive steps of a mechanism whose noise is correlated (``core/correlated.py``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from dptrain.core.entropy import Key
from dptrain.core.spec import StepSpec

from .noise import noisy_mean


class CorrelatedNoise:
    """Draws Z_0, Z_1, ..., each from those before it, of which it keeps bands - 1: secret, like a key.

    Attributes:
        coefficients: of C, by band.
        steps: how many have been drawn.

    Args:
        taken: steps of a run that goes on, whose noise is drawn again before that of the next.
        key_of: the key of each of them.

    Raises:
        ValueError: steps without their keys.
    """

    def __init__(
        self,
        coefficients: tuple[float, ...],
        taken: int = 0,
        key_of: Callable[[int], Key] | None = None,
    ):
        if taken and key_of is None:
            raise ValueError("the noise of the steps that were taken is drawn again: say with which keys.")
        self.coefficients = tuple(coefficients)
        first, *others = coefficients
        self._earlier: deque[Any] = deque(maxlen=len(others))
        self._taken, self._key_of = taken, key_of
        self.steps = 0

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
        while self._key_of is not None and self.steps < self._taken:
            self._draw(like, spec, self._key_of(self.steps))
        return self._draw(like, spec, key)

    def _draw(self, like: Any, spec: StepSpec, key: Key) -> Any:
        zeros = jax.tree.map(_zeros, like)
        drawn = noisy_mean(zeros, spec.noise_stddev, spec.expected_batch_size, key, donate=True)
        drawn = self._combined(drawn, tuple(self._earlier))
        self._earlier.appendleft(drawn)
        self.steps += 1
        return drawn


def _zeros(x: Array) -> Array:
    """In shards where it is; else not committed to a device, or what follows is compiled for both."""
    where = x.sharding if isinstance(x.sharding, NamedSharding) else None
    return jnp.zeros(x.shape, x.dtype, device=where)
