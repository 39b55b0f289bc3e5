"""The noise of consecutive steps of a mechanism whose noise is correlated (``core/correlated.py``)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dptrain.core.entropy import Key
from dptrain.core.noise import Span
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
        self._first, *self._others = coefficients
        self._earlier: deque[dict[str, Tensor]] = deque(maxlen=len(self._others))
        self._taken, self._key_of = taken, key_of
        self.steps = 0

    def next(
        self,
        like: Mapping[str, Tensor],
        spec: StepSpec,
        key: Key,
        spans: Mapping[str, Span] | None = None,
    ) -> dict[str, Tensor]:
        """Z_t / L by name, in new tensors.

        Args:
            like: what it will be added to: float32 or better.
            spec: of the step.
            key: the step's own, used for W_t and nothing else.
            spans: which elements of its parameter each of them holds, if not all; the same at every step.
        """
        while self._key_of is not None and self.steps < self._taken:
            self._draw(like, spec, self._key_of(self.steps), spans)
        return self._draw(like, spec, key, spans)

    def _draw(
        self, like: Mapping[str, Tensor], spec: StepSpec, key: Key, spans: Mapping[str, Span] | None
    ) -> dict[str, Tensor]:
        drawn = {name: torch.zeros_like(total) for name, total in like.items()}
        noisy_mean(drawn, spec.noise_stddev, spec.expected_batch_size, key, out=drawn, spans=spans)
        for name, noise in drawn.items():
            for c, earlier in zip(self._others, self._earlier):
                noise.sub_(earlier[name], alpha=c)
            noise.div_(self._first)
        self._earlier.appendleft(drawn)
        self.steps += 1
        return drawn
