"""A clip norm that follows a quantile of the gradient norms, as of `dptrain.core.clip_rules.Quantile`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.core import checks
from dptrain.core.clip_rules import Quantile
from dptrain.core.entropy import Key
from dptrain.core.noise import noisy_mean
from dptrain.core.releases import Numbers
from dptrain.core.spec import StepSpec

FURTHEST = 1e6
"""By which factor the clip norm may leave the first one."""


class FollowedClipNorm:
    """C of the steps of a run, which is public: it is made of noisy counts alone.

    Attributes:
        clip_norm: of the next step. To be saved with the weights, and set again when a run goes on.

    Raises:
        ValueError: a clip norm that is not positive.
    """

    def __init__(self, rule: Quantile, clip_norm: float | None = None) -> None:
        self.rule = rule
        self.clip_norm = checks.positive("clip_norm", rule.clip_norm if clip_norm is None else clip_norm)

    def step(self, spec: StepSpec) -> StepSpec:
        """The specification by which the sum of this step is released."""
        return spec.at(self.clip_norm)

    def centred(self, norms: npt.NDArray[Any]) -> float:
        """The sum of b - 1/2 over examples with these norms: b is 1 where the norm is at most `clip_norm`,
        else 0, also where it is not finite."""
        return float(np.count_nonzero(norms <= self.clip_norm)) - 0.5 * norms.size

    def moved(self, centred: float, spec: StepSpec, key: Key) -> float:
        """The clip norm of the next step, by this step's noisy count. It is released with the step's sum.

        The realised batch size is private, so the share of examples below C is estimated as
        1/2 + (sum of (b - 1/2) + N(0, σ_b²)) / L, which one example moves by 1 / (2 L).

        Args:
            centred: of all examples of the logical batch.
            spec: of this step.
            key: this step's own; the count has a key of its own below it.
        """
        count = {"count": np.array([centred], dtype=np.float64)}
        noisy_mean(
            count, count, self.rule.count_noise, spec.expected_batch_size, key.child("count"), threads=1
        )
        share = 0.5 + float(count["count"][0])
        moved = self.clip_norm * math.exp(-self.rule.learning_rate * (share - self.rule.quantile))
        first = self.rule.clip_norm
        return min(max(moved, first / FURTHEST), first * FURTHEST)


def released(gradient: Numbers, moved: float | None) -> Numbers:
    """What a step releases: its noisy gradient and, where it has one, the clip norm of the next."""
    if moved is None:
        return gradient
    # No parameter's name begins with a dot.
    return lambda: {**gradient(), ".clip_norm": np.array(moved)}
