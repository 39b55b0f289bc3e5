"""The noise of consecutive steps of a mechanism whose noise is correlated (``core/correlated.py``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dptrain.core.correlated import NoiseChain
from dptrain.core.entropy import Key
from dptrain.core.noise import Span
from dptrain.core.spec import StepSpec

from .noise import noisy_mean


class CorrelatedNoise(NoiseChain):
    """Noise for sums that are tensors by name; as of ``NoiseChain``."""

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
        first, *others = self.coefficients

        def drawn(key: Key) -> dict[str, Tensor]:
            found = {name: torch.zeros_like(total) for name, total in like.items()}
            noisy_mean(found, spec.noise_stddev, spec.expected_batch_size, key, out=found, spans=spans)
            for name, noise in found.items():
                for c, earlier in zip(others, self._earlier):
                    noise.sub_(earlier[name], alpha=c)
                noise.div_(first)
            return found

        return self._next(key, drawn)
