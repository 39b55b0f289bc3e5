"""What both engines hold to when they release a noisy gradient, and what they may tell of it."""

import math
from dataclasses import dataclass

from dptrain.core.clip_rules import Quantile
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import StepSpec


@dataclass(frozen=True)
class Step:
    """What a step may tell: public values only."""

    number: int  #: counts from 1
    steps: int
    #: spent after this step, or a cheap upper bound (exact at the end); None without a delta
    epsilon: float | None


def step_to_release(mechanism: Mechanism | StepSpec, clip_norm: float, grid: float | None = None) -> StepSpec:
    """The step that may release a sum whose parts were clipped to `clip_norm` (infinite: not clipped).

    Args:
        grid: the spacing of the grid that the sum lies on; None if on none.

    Raises:
        TypeError: neither a mechanism nor one of its steps.
        ValueError: the mechanism changes from step to step, accounts for another clip norm or grid, or would
            make a sum private that was not clipped.
    """
    spec = mechanism.step(0) if isinstance(mechanism, Mechanism) else mechanism
    if not isinstance(spec, StepSpec):
        raise TypeError("privatize needs a Mechanism or the StepSpec of this step.")
    if isinstance(mechanism, Mechanism) and len(mechanism.segments) > 1:
        raise ValueError("this mechanism changes from step to step: pass mechanism.step(i).")
    if isinstance(spec.clip_rule, Quantile):
        raise ValueError("this step's clip norm follows a quantile: pass step.at(the clip norm it has now).")
    bounded = math.isfinite(clip_norm)
    if bounded and not math.isclose(clip_norm, spec.sensitivity, rel_tol=1e-12):
        raise ValueError(
            f"the sum was clipped to {clip_norm}, but the mechanism accounts for {spec.sensitivity}: use the "
            "mechanism's clip norm in clipped_grad."
        )
    if grid != spec.grid:
        said = ["no grid" if spacing is None else f"a grid of {spacing:g}" for spacing in (grid, spec.grid)]
        raise ValueError(
            f"the sum lies on {said[0]}, but the mechanism has {said[1]}: use the mechanism's grid in "
            "clipped_grad."
        )
    if not bounded and spec.noise_multiplier > 0:
        raise ValueError("a sum that was not clipped cannot be made private by noise.")
    return spec


def check_dataset_size(mechanism: Mechanism, size: int) -> None:
    """Refuse a data set of `size` examples whose expected batch is not the mechanism's L, within 1 %.

    Raises:
        ValueError: they differ by more.
    """
    for spec, _ in mechanism.segments:
        expected = spec.sample_rate * size
        if abs(spec.expected_batch_size - expected) > 0.01 * expected:
            raise ValueError(
                f"the mechanism expects batches of {spec.expected_batch_size:g}, but its sample "
                f"rate times the {size} examples is {expected:g}: they must agree within 1 %."
            )
