"""Searches for the parameter that just meets a privacy budget."""

import math
from collections.abc import Callable
from functools import partial

from dptrain.core import accounting, checks
from dptrain.core.accounting import PLD, RDP, Segments
from dptrain.core.spec import StepSpec

# Below this σ the privacy loss is so wide that a PLD takes gigabytes, and no ε worth
# the name comes out; above the other, noise drowns every signal.
_SMALLEST_SIGMA = 0.05
_LARGEST_SIGMA = 1e6
_MOST_STEPS = 10**9


def smallest_noise_multiplier(
    step_with: Callable[[float], StepSpec],
    *,
    steps: int,
    epsilon: float,
    delta: float,
    neighbours: str,
    accountant: str = PLD,
    relative_tolerance: float = 1e-4,
) -> float:
    """The smallest σ for which `steps` steps cost at most `epsilon` at `delta`.

    The result always meets the budget, and leaves at most `relative_tolerance` of it
    unspent. ε falls strictly with σ, so a bracket that is narrowed finds it.

    Args:
        step_with: the step specification for a given σ.

    Raises:
        ValueError: no σ in the searched range meets the budget, or even the smallest
            does; or a combination that is not supported.
    """
    steps = checks.whole("steps", steps)
    return smallest_scale(
        lambda sigma: ((step_with(sigma), steps),),
        epsilon=epsilon,
        delta=delta,
        neighbours=neighbours,
        accountant=accountant,
        relative_tolerance=relative_tolerance,
    )


def smallest_scale(
    segments_with: Callable[[float], Segments],
    *,
    epsilon: float,
    delta: float,
    neighbours: str,
    accountant: str = PLD,
    relative_tolerance: float = 1e-4,
) -> float:
    """The smallest σ for which these segments together cost at most `epsilon` at `delta`.

    As `smallest_noise_multiplier`, for mechanisms whose steps differ.

    Args:
        segments_with: the segments for a given σ, which all noise multipliers are proportional to.

    Raises:
        ValueError: as there.
    """
    epsilon, delta = checks.positive("epsilon", epsilon), checks.delta(delta)

    def overspent(sigma: float, by: str = accountant) -> float:
        """ln(ε / budget): nearly a straight line in ln σ, of slope −1 to −2."""
        spent = accounting.epsilon(segments_with(sigma), delta, neighbours, by)
        return math.log(max(spent, 1e-300) / epsilon)

    segments = segments_with(1.0)
    accounting.check_supported(segments, neighbours, accountant)
    guess = 1.0
    if accountant == PLD and all(RDP in accounting.supported(s.sampler, neighbours) for s, _ in segments):
        # RDP is a looser bound and much faster to compute: its answer is nearly ours.
        guess = _solve(partial(overspent, by=RDP), guess, 2e-2, epsilon)
    return _solve(overspent, guess, relative_tolerance, epsilon)


def most_steps(
    step: StepSpec,
    *,
    epsilon: float,
    delta: float,
    neighbours: str,
    accountant: str = PLD,
) -> int:
    """The largest number of steps like `step` that cost at most `epsilon` at `delta`.

    Raises:
        ValueError: one step alone costs more, or the number is beyond 10⁹.
    """
    epsilon, delta = checks.positive("epsilon", epsilon), checks.delta(delta)

    def fits(steps: int, by: str = accountant) -> bool:
        return accounting.epsilon(((step, steps),), delta, neighbours, by) <= epsilon

    if not fits(1):
        raise ValueError(
            f"a single step already costs more than epsilon {epsilon}; "
            "raise the noise multiplier or the budget."
        )
    low = 1
    if accountant == PLD and RDP in accounting.supported(step.sampler, neighbours):
        guess = _last(partial(fits, by=RDP), 1) if fits(1, RDP) else 1
        low = guess if fits(guess) else 1
    return _last(fits, low)


def _solve(overspent: Callable[[float], float], guess: float, tolerance: float, epsilon: float) -> float:
    """A σ at which `overspent`, which falls with σ, lies in [-tolerance, 0]."""
    low, high, at_low, at_high = _bracket(overspent, guess, epsilon)
    # Illinois variant of regula falsi: the bracket always holds the root, so that the
    # answer can be taken from the side that meets the budget. An end that stays for the
    # second time has its weight halved, or it might stay for ever.
    aim = -tolerance / 2  # well inside the budget, not at its very edge
    weight_low, weight_high = at_low - aim, at_high - aim
    moved = ""
    while at_high < -tolerance and high > low * (1 + 1e-12):
        share = weight_low / (weight_low - weight_high) if weight_low > 0 > weight_high else 0.5
        middle = low * (high / low) ** share
        at_middle = overspent(middle)
        if at_middle > 0:
            low, weight_low = middle, at_middle - aim
            weight_high /= 2 if moved == "low" else 1
            moved = "low"
        else:
            high, at_high, weight_high = middle, at_middle, at_middle - aim
            weight_low /= 2 if moved == "high" else 1
            moved = "high"
    return high


def _bracket(
    overspent: Callable[[float], float], guess: float, epsilon: float
) -> tuple[float, float, float, float]:
    """Two σ with the budget between them, and `overspent` at both."""
    low = high = guess
    at_low = at_high = overspent(guess)
    # The slope is seldom flatter than −1, so a step as long as the excess crosses.
    while at_high > 0:
        if high >= _LARGEST_SIGMA:
            raise ValueError(
                f"no noise multiplier up to {_LARGEST_SIGMA:g} meets epsilon {epsilon}; "
                "raise epsilon or delta, or lower the number of steps or the sample rate."
            )
        low, at_low = high, at_high
        high = min(high * min(max(math.exp(at_high), 1.01), 4.0), _LARGEST_SIGMA)
        at_high = overspent(high)
    while at_low <= 0:
        if low <= _SMALLEST_SIGMA:
            raise ValueError(
                f"epsilon {epsilon} needs a noise multiplier below {_SMALLEST_SIGMA}: "
                "such a budget protects nobody; lower epsilon."
            )
        high, at_high = low, at_low
        low = max(low / min(max(math.exp(-at_low), 1.01), 1.5), _SMALLEST_SIGMA)
        at_low = overspent(low)
    return low, high, at_low, at_high


def _last(fits: Callable[[int], bool], low: int) -> int:
    """The largest integer that fits, given that `low` does and that larger fit less."""
    # Strides grow, so that a close guess costs few evaluations.
    stride = max(1, low // 64)
    high = low + stride
    while fits(high):
        low, stride = high, stride * 2
        high = low + stride
        if high > _MOST_STEPS:
            raise ValueError(f"more than {_MOST_STEPS} steps meet this budget; lower the noise multiplier.")
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
