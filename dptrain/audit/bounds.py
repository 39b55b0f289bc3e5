"""From scores to lower bounds on ε: statistics alone, of arrays.

Confidence is honest: thresholds are chosen by rank before the data are seen, and the significance is shared
out to all statements that are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]

#: between the ranks that become thresholds, and between the numbers of guesses
_STRIDE = 4
_LARGEST_EPSILON = 100.0


@dataclass(frozen=True)
class Evidence:
    """What one adversary saw.

    Attributes:
        adversary: what it looked at.
        scores: ``[m]``, larger where it believes that the canary took part; not a number counts as infinite,
            for a model that is spoilt tells as much.
        present: bool ``[m]``, the truth.
    """

    adversary: str
    scores: Array
    present: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        found = np.asarray(self.scores, np.float64)
        object.__setattr__(self, "scores", np.where(np.isnan(found), np.inf, found))
        if self.scores.shape != self.present.shape or self.scores.ndim != 1:
            raise ValueError("scores and present must be two vectors of one length.")

    def sorted_by_truth(self) -> tuple[Array, Array]:
        """The scores of those that were absent and of those that were present, ascending."""
        return np.sort(self.scores[~self.present]), np.sort(self.scores[self.present])


def shares(significance: float, adversaries: int) -> list[float]:
    """Half for the first adversary, who has no better where all is as stated, and the rest for the others."""
    if adversaries == 1:
        return [significance]
    return [significance / 2] + [significance / 2 / (adversaries - 1)] * (adversaries - 1)


def upper_limit(successes: int, trials: int, significance: float) -> float:
    """The one-sided upper confidence limit of a probability (Clopper and Pearson 1934)."""
    if successes >= trials:
        return 1.0
    return float(stats.beta.isf(significance, successes + 1, trials - successes))


def error_rates(evidence: Evidence, significance: float) -> Array:
    """Upper limits ``[n, 2]`` on (false positive rate, false negative rate) of n tests, all of them together
    wrong with probability `significance` at most.

    Thresholds are order statistics. That of rank j among n absent scores is exceeded by another with a
    probability that is Beta(j, n - j + 1) distributed or smaller, whatever the distribution of scores, so
    that it need not be known beforehand; the other rate is counted on scores that had no part in it.

    Assumes that scores are independent, and identically distributed among those that were absent and among
    those that were present.
    """
    absent, present = evidence.sorted_by_truth()
    if not len(absent) or not len(present):
        return np.ones((1, 2))
    ranks = [(j, True) for j in _ranks(len(absent))] + [(j, False) for j in _ranks(len(present))]
    each = significance / (2 * len(ranks))
    rates = []
    for j, among_absent in ranks:
        if among_absent:  # "present" is said of scores above the j-th largest of the absent
            missed = int(np.searchsorted(present, absent[-j], side="right"))
            rates.append((upper_limit(j - 1, len(absent), each), upper_limit(missed, len(present), each)))
        else:  # and of those not below the j-th smallest of the present
            taken = len(absent) - int(np.searchsorted(absent, present[j - 1], side="left"))
            rates.append((upper_limit(taken, len(absent), each), upper_limit(j - 1, len(present), each)))
    return np.array(rates)


def epsilon_of_rates(rates: Array, delta: float) -> float:
    """The largest ε that these error rates refute at δ.

    Under (ε, δ)-differential privacy ``1 - FNR <= e^ε FPR + δ`` and the same with the two exchanged (Kairouz,
    Oh and Viswanath 2015, arXiv 1311.0776).
    """
    best = 0.0
    for ours, other in (rates.T, rates.T[::-1]):
        caught = np.maximum(1 - delta - other, 0)
        with np.errstate(divide="ignore"):
            best = max(best, float(np.max(np.log(caught) - np.log(ours))))
    return min(best, _LARGEST_EPSILON)


def _ranks(n: int) -> list[int]:
    """1, 4, 16, ... up to n."""
    return [_STRIDE**i for i in range(1 + int(math.log(n, _STRIDE) + 1e-9))]


@dataclass(frozen=True)
class Guesses:
    """Of m canaries whose presence fair coins decided, `made` were guessed and `correct` of these rightly."""

    canaries: int
    made: int
    correct: int


def guesses(evidence: Evidence) -> list[Guesses]:
    """Of the k largest scores it is guessed that they were present, of the k smallest that they were absent;
    for k = 1, 4, 16, ... up to half of all. Ties are broken by place, which coins know nothing of."""
    order = np.argsort(evidence.scores, kind="stable")
    truth, m = evidence.present[order], len(order)
    return [
        Guesses(m, 2 * k, int(truth[m - k :].sum() + (~truth[:k]).sum()))
        for k in _ranks(m // 2)
        if 2 * k <= m
    ]


def one_run_p_value(found: Guesses, epsilon: float, delta: float) -> float:
    """The probability, at most, of so many correct guesses under (ε, δ)-differential privacy.

    Theorem 5.2 of Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run" (arXiv
    2305.08846): ``P[W >= v] <= P[B >= v] + 2 m δ max_i P[v > B >= v - i] / i`` with B binomial of the guesses
    that were made and ``e^ε / (1 + e^ε)``. It supposes nothing but fair and independent coins.
    """
    right = stats.binom(found.made, 1 / (1 + math.exp(-epsilon)))
    tail = float(right.sf(found.correct - 1))
    if delta == 0 or not found.correct:
        return min(tail, 1.0)
    i = np.arange(1, found.correct + 1)
    steepest = np.max((right.sf(found.correct - i - 1) - tail) / i)
    return min(tail + 2 * found.canaries * delta * float(steepest), 1.0)


def one_run_epsilon(found: Guesses, delta: float, significance: float) -> float:
    """The largest ε that so many correct guesses refute at δ; 0 if none."""
    return _largest_refuted(lambda epsilon: one_run_p_value(found, epsilon, delta) <= significance)


def _largest_refuted(refuted: Callable[[float], bool]) -> float:
    """Where `refuted`, true up to some ε, ends; from below, to 1e-4."""
    low, high = 0.0, 1.0
    if not refuted(low):
        return 0.0
    while refuted(high):
        low, high = high, 2 * high
        if low >= _LARGEST_EPSILON:
            return _LARGEST_EPSILON
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
