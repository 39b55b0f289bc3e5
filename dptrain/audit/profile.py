"""The whole privacy profile δ(ε) of a mechanism, and what contradicts it."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import privacy_loss_distribution as pld

from dptrain.audit.bounds import Array, Guesses
from dptrain.core.mechanism import Mechanism

_POINTS = 120
#: hypotheses about the noise are powers of ``_RATIO`` times what is stated, from a third of it to ten times
_RATIO, _LEAST, _MOST = 1.01, -110, 230

#: runs of equal steps: noise multiplier, sample rate, how many
_Steps = tuple[tuple[float, float, int], ...]


class Profile:
    """``P(S) <= e^ε Q(S) + δ`` for a list of (ε, δ), for neighbours either way round.

    Attributes:
        epsilons, deltas: ``[n]``.
    """

    def __init__(self, epsilons: Array, deltas: Array):
        self.epsilons, self.deltas = np.asarray(epsilons, np.float64), np.asarray(deltas, np.float64)
        self._starts, self._lines = _envelope(
            np.concatenate([[0.0], np.exp(-self.epsilons), np.exp(self.epsilons)]),
            np.concatenate(
                [[0.0], -self.deltas * np.exp(-self.epsilons), 1 - self.deltas - np.exp(self.epsilons)]
            ),
        )

    def refuted_by(self, rates: Array) -> bool:
        """Whether a test can have no such error rates (``[n, 2]``, upper limits)."""
        grown = np.exp(self.epsilons)
        return any(
            bool(np.any(1 - self.deltas - np.outer(ours, grown) - other[:, None] > 0))
            for ours, other in (rates.T, rates.T[::-1])
        )

    def least(self, probability: float) -> float:
        """The smallest probability that an event may have where it has this one on a neighbour."""
        slope, intercept = self._lines[bisect.bisect_right(self._starts, probability) - 1]
        return slope * probability + intercept

    def refuted_by_guesses(self, found: Guesses, significance: float) -> bool:
        """Whether so many correct guesses have a probability below `significance`.

        Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-differential privacy in one run" (arXiv
        2410.22235). With p_i the probability of i correct guesses among n, and m canaries, let
        ``r_i = Σ_{j>=i} j p_j / m`` and ``h_i = Σ_{j>=i} (n - j) p_j / m``. Flipping the coin of a canary
        that was guessed rightly turns i correct guesses into i - 1 under the same output, so that
        ``h_{i-1} >= least(r_i)`` for every i: were the tail as likely as `significance`, the whole would come
        to more than ``r_0 + h_0 = n / m``.
        """
        n, v, m = found.made, found.correct, found.canaries
        r, h = significance * v / m, significance * (n - v) / m
        for i in range(v - 1, -1, -1):
            grown = self.least(min(r, 1.0))
            if grown <= h or r + h > n / m:
                break  # neither changes any more, or they have come to too much
            r, h = r + i / (n - i) * (grown - h), grown
        return r + h > n / m


def _envelope(slopes: Array, intercepts: Array) -> tuple[list[float], list[tuple[float, float]]]:
    """The largest of many lines, from where on it is which."""
    starts: list[float] = []
    lines: list[tuple[float, float]] = []
    for slope, intercept in sorted(zip(slopes.tolist(), intercepts.tolist())):
        start = -math.inf
        while lines:
            if lines[-1][0] == slope:  # sorted: the new one is not below
                lines.pop(), starts.pop()
                continue
            start = (lines[-1][1] - intercept) / (slope - lines[-1][0])
            if start > starts[-1]:
                break
            lines.pop(), starts.pop()
            start = -math.inf
        lines.append((slope, intercept))
        starts.append(start)
    return starts, lines


class Noises:
    """The stated mechanism with other noise: hypotheses in one order, from little noise to much.

    Profiles are computed when they are asked for.
    """

    def __init__(self, stated: Mechanism):
        self.stated = stated

    def bound(self, refuted: Callable[[Profile], bool], delta: float) -> tuple[float, float]:
        """``(s, ε)``: the noise is below s times what is stated, hence ε at least this; (inf, 0) if nothing
        is refuted.

        Args:
            refuted: of a profile; what refutes one refutes those of more noise.
        """
        if not refuted(self._profile(_MOST)):
            return math.inf, 0.0
        low, high = _LEAST - 1, _MOST
        while high - low > 1:
            middle = 0 if low < 0 < high else (low + high) // 2  # what is stated comes first
            low, high = (low, middle) if refuted(self._profile(middle)) else (middle, high)
        return _RATIO**high, self._epsilon(high, delta)

    def _profile(self, index: int) -> Profile:
        return profile_of(scaled(self.stated, _RATIO**index))

    def _epsilon(self, index: int, delta: float) -> float:
        losses = _losses(_steps(scaled(self.stated, _RATIO**index)), pessimistic=False)
        return float(losses.get_epsilon_for_delta(delta))


def profile_of(mechanism: Mechanism) -> Profile:
    """From ε = 0 to where δ is nothing."""
    return _profile(_steps(mechanism))


# Of these numbers alone, so that the memo cannot be seen from outside except as time.
@functools.lru_cache(maxsize=256)
def _profile(steps: _Steps) -> Profile:
    losses = _losses(steps, pessimistic=True)
    most = max(losses.get_epsilon_for_delta(1e-12), 1e-3)
    epsilons = np.concatenate([[0.0], np.geomspace(most / 1e3, most, _POINTS)])
    return Profile(epsilons, np.array(losses.get_delta_for_epsilon(list(epsilons))))


def _steps(mechanism: Mechanism) -> _Steps:
    return tuple((spec.noise_multiplier, spec.sample_rate, count) for spec, count in mechanism.segments)


def scaled(mechanism: Mechanism, factor: float) -> Mechanism:
    """The mechanism with its noise multiplied."""
    return dataclasses.replace(
        mechanism,
        segments=tuple(
            (dataclasses.replace(spec, noise_multiplier=factor * spec.noise_multiplier), count)
            for spec, count in mechanism.segments
        ),
    )


def _losses(steps: _Steps, *, pessimistic: bool) -> pld.PrivacyLossDistribution:
    """Of Poisson sampling and Gaussian noise, neighbours differing by one example."""
    # Rounding all steps' losses to this moves ε by about a hundredth, more where ε is dozens.
    interval = min(1e-3, 1e-2 / sum(count for *_, count in steps)) / min(1.0, *(s for s, *_ in steps)) ** 2
    runs = [
        pld.from_gaussian_mechanism(
            noise_multiplier,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=interval,
            use_connect_dots=pessimistic,
            sampling_prob=sample_rate,
            neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        ).self_compose(count)
        for noise_multiplier, sample_rate, count in steps
    ]
    return functools.reduce(lambda a, b: a.compose(b), runs)
