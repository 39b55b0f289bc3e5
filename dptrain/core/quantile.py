"""A clip norm that follows a quantile of the gradient norms, as of `dptrain.core.clip_rules.Quantile`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dptrain.core import checks
from dptrain.core.clip_rules import LEAST_CLIP_NORM, Quantile
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
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
        return min(max(moved, first / FURTHEST, LEAST_CLIP_NORM), first * FURTHEST)


def followed(mechanism: Mechanism, clip_norm: float | None = None) -> FollowedClipNorm | None:
    """The clip norm of a mechanism whose clip norm follows a quantile; None of any other.

    Args:
        clip_norm: that a run which goes on has come to.

    Raises:
        ValueError: there is a clip norm, and nothing to follow; or not all steps follow the same quantile.
    """
    rules = {spec.clip_rule for spec, _ in mechanism.segments}
    rule = next((rule for rule in rules if isinstance(rule, Quantile)), None)
    if rule is None:
        if clip_norm is not None:
            raise ValueError("the clip norm is the mechanism's; leave clip_norm out.")
        return None
    if len(rules) > 1:
        raise ValueError("a clip norm follows one quantile; give all steps of the mechanism the same rule.")
    return FollowedClipNorm(rule, clip_norm)


def released(gradient: Numbers, moved: float | None) -> Numbers:
    """What a step releases: its noisy gradient and, where it has one, the clip norm of the next."""
    if moved is None:
        return gradient
    return lambda: {**gradient(), "\0clip norm": np.array(moved)}  # no parameter has such a name
