"""Mechanisms whose noise, clip norm or batch size change over a run, in a few pieces.

Each piece is a run of equal steps, so the accountant composes as many privacy loss distributions as there are
pieces: what it says of the whole is as tight as of a constant mechanism.
"""

from __future__ import annotations

from dataclasses import replace

from dptrain.core import calibration, checks
from dptrain.core.accounting import ADD_OR_REMOVE_ONE, PLD, Segments
from dptrain.core.clip_rules import Flat
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import POISSON, Sampling, StepSpec

PIECES = 8


def ramped(
    first: StepSpec,
    steps: int,
    *,
    delta: float,
    noise: float = 1.0,
    clip: float = 1.0,
    batch: float = 1.0,
    epsilon: float | None = None,
    accountant: str = PLD,
    neighbours: str = ADD_OR_REMOVE_ONE,
    pieces: int = PIECES,
) -> Mechanism:
    """A mechanism that begins with the step `first` and changes geometrically from piece to piece.

    Args:
        noise, clip, batch: by which factor the noise multiplier, the clip norm (of flat clipping), and the
            expected batch size with the sample rate differ in the last piece from the first.
        epsilon: the budget that all steps together shall just meet: the noise multiplier of `first` is then
            found, and what it states has no meaning. None: as it states.
        pieces: at most; no more than there are steps.

    Raises:
        ValueError: a factor that is not positive, a sample rate above 1, a sampler other than Poisson, or a
            clip norm that changes and is not flat.
    """
    factors = {"noise": noise, "clip": clip, "batch": batch}
    for name, factor in factors.items():
        checks.positive(name, factor)
    if first.sampler != POISSON:
        raise ValueError(f"a mechanism changes by Poisson sampling only, and the sampler is {first.sampler}.")
    if clip != 1 and not isinstance(first.clip_rule, Flat):
        raise ValueError(f"the clip norm of {first.clip_rule.name} clipping cannot change; leave clip at 1.")
    if first.sample_rate * max(1.0, batch) > 1:
        raise ValueError(
            f"the sample rate would grow from {first.sample_rate:g} to {first.sample_rate * batch:g}, and it "
            "can be at most 1; begin with smaller batches."
        )
    lengths = _lengths(steps, pieces)

    def with_noise(sigma: float) -> Segments:
        return tuple(
            (_changed(first, sigma, noise**way, clip**way, batch**way), length)
            for way, length in zip(_ways(len(lengths)), lengths)
        )

    sigma = first.noise_multiplier
    if epsilon is not None:
        sigma = calibration.smallest_scale(
            with_noise, epsilon=epsilon, delta=delta, neighbours=neighbours, accountant=accountant
        )
    return Mechanism(with_noise(sigma), neighbours, delta)


def _changed(first: StepSpec, sigma: float, noise: float, clip: float, batch: float) -> StepSpec:
    rule = Flat(first.clip_norm * clip) if isinstance(first.clip_rule, Flat) else first.clip_rule
    return replace(
        first,
        clip_rule=rule,
        noise_multiplier=sigma * noise,
        sampling=Sampling(POISSON, min(1.0, first.sample_rate * batch)),
        expected_batch_size=first.expected_batch_size * batch,
    )


def _lengths(steps: int, pieces: int) -> list[int]:
    """As even as can be."""
    steps, count = checks.whole("steps", steps), min(checks.whole("pieces", pieces), steps)
    ends = [steps * (i + 1) // count for i in range(count)]
    return [end - start for start, end in zip([0, *ends], ends)]


def _ways(count: int) -> list[float]:
    """From 0 for the first piece to 1 for the last."""
    return [i / max(1, count - 1) for i in range(count)]
