"""The noise of consecutive steps of a mechanism whose noise is correlated (``core/correlated.py``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dptrain.core.entropy import Key
from dptrain.core.spec import StepSpec

from .noise import noisy_mean


class CorrelatedNoise:
    """Draws Z_0, Z_1, ..., each from those before it, of which it keeps bands - 1: secret, like a key.

    Attributes:
        steps: how many have been drawn.
    """

    def __init__(self, coefficients: tuple[float, ...]):
        self._first, *self._others = coefficients
        self._earlier: deque[dict[str, Tensor]] = deque(maxlen=len(self._others))
        self.steps = 0

    def next(self, like: Mapping[str, Tensor], spec: StepSpec, key: Key) -> dict[str, Tensor]:
        """Z_t / L by name, in new tensors.

        Args:
            like: what it will be added to: float32 or better.
            spec: of the step.
            key: the step's own, used for W_t and nothing else.
        """
        drawn = {name: torch.zeros_like(total) for name, total in like.items()}
        noisy_mean(drawn, spec.noise_stddev, spec.expected_batch_size, key, out=drawn)
        for name, noise in drawn.items():
            for c, earlier in zip(self._others, self._earlier):
                noise.sub_(earlier[name], alpha=c)
            noise.div_(self._first)
        self._earlier.appendleft(drawn)
        self.steps += 1
        return drawn

    def catch_up(
        self, steps: int, like: Mapping[str, Tensor], spec: StepSpec, key_of: Callable[[int], Key]
    ) -> None:
        """Draw again what earlier steps had, up to so many in all: of a run that goes on.

        Args:
            key_of: the key of each of them.
        """
        while self.steps < steps:
            self.next(like, spec, key_of(self.steps))
