"""Interleaved timing: all contestants take turns, so that whatever the machine does hits all of them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from dptrain.bench.contestant import Contestant

#: rounds that are run whatever the time
LEAST_ROUNDS = 5
#: baselines that are so much slower than the best of them after these do not go on
HOPELESS = 1.15
#: what the ratio is to be known to, when there is time
PRECISE = 0.005
RESAMPLES = 2000


def seconds(run: Callable[[], None]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def warm_up(contestant: Contestant) -> None:
    """A logical step of three: probing, compiling, and what a first call allocates."""

    def logical_step() -> None:
        for _ in range(3 - contestant.ends_with_a_step):
            contestant.step()
        contestant.end()

    contestant.warm_up_s = seconds(logical_step)


def race(
    contestants: Sequence[Contestant],
    accumulate: int,
    limit_s: float,
    agreed: Callable[[bool], bool] = bool,
) -> None:
    """Rounds, until the ratios are known to `PRECISE` or the time is up.

    In a round each contestant takes the first physical step of a logical one, then a later one, which
    also accumulates, then the end: each time in a new order, for a step is slower after some than after
    others, by what they leave in the caches. Baselines that cannot be the best leave after `LEAST_ROUNDS`.

    agreed: of several processes that race side by side: whether all stop, by what one of them thinks.
    """
    started, rounds = time.perf_counter(), 0
    chance = random.Random(0)  # the same in all processes

    def in_some_order() -> list[Contestant]:
        return chance.sample(contestants, len(contestants))

    while True:
        gc.collect()
        for c in in_some_order():
            c.first_s.append(seconds(c.step))
        for c in in_some_order():
            c.later_s.append(seconds(c.step))
        for c in in_some_order():
            c.end_s.append(seconds(c.end) - c.later_s[-1] * c.ends_with_a_step)
        rounds += 1
        elapsed = time.perf_counter() - started
        if rounds < LEAST_ROUNDS:
            continue
        if rounds == LEAST_ROUNDS:
            slow = HOPELESS * logical_s(best(contestants, accumulate), accumulate)
            contestants = [
                c for c in contestants if c.role == "case" or agreed(logical_s(c, accumulate) < slow)
            ]
        late = elapsed * (rounds + 1) / rounds > limit_s
        if agreed(late or _uncertainty(contestants, accumulate) < PRECISE):
            return


def logical_s(contestant: Contestant, accumulate: int) -> float:
    """Seconds of a logical step of so many physical ones, from medians."""
    first, later, end = map(statistics.median, (contestant.first_s, contestant.later_s, contestant.end_s))
    return first + (accumulate - 1) * later + end


def best(contestants: Sequence[Contestant], accumulate: int) -> Contestant:
    """The fastest baseline: what all others are measured by."""
    baselines = [c for c in contestants if c.role == "baseline"]
    return min(baselines, key=lambda c: logical_s(c, accumulate))


def paired_ratios(base: Contestant, contestant: Contestant, accumulate: int) -> list[float]:
    """Ratios of the speeds within each round."""
    return [theirs / ours for theirs, ours in zip(_rounds(base, accumulate), _rounds(contestant, accumulate))]


def quartiles(values: Sequence[float]) -> list[float]:
    """The lower and the upper one."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def interval95(base: Contestant, contestant: Contestant, accumulate: int) -> list[float]:
    """Of the ratio of the speeds, by resampling rounds (percentile bootstrap, Efron 1979)."""
    times = np.array([[c.first_s, c.later_s, c.end_s] for c in (base, contestant)])  # [2, 3, rounds]
    rounds = times.shape[2]
    drawn = np.random.default_rng(0).integers(rounds, size=(RESAMPLES, rounds))
    first, later, end = np.median(times[:, :, drawn], axis=3).swapaxes(0, 1)  # [2, resamples] each
    whole = first + (accumulate - 1) * later + end
    return np.percentile(whole[0] / whole[1], (2.5, 97.5)).tolist()


def _rounds(c: Contestant, accumulate: int) -> list[float]:
    return [f + (accumulate - 1) * n + e for f, n, e in zip(c.first_s, c.later_s, c.end_s)]


def _uncertainty(contestants: Sequence[Contestant], accumulate: int) -> float:
    """Half the notch of a box plot of the paired ratios, or of the times where there is only a baseline.

    1.57 (q3 - q1) / sqrt(n): McGill, Tukey and Larsen 1978, "Variations of box plots", for about 95 %.
    """
    base = best(contestants, accumulate)
    cases = [paired_ratios(base, c, accumulate) for c in contestants if c.role == "case"]
    whole = _rounds(base, accumulate)
    middle = statistics.median(whole)
    return max(_notch(values) for values in cases or [[each / middle for each in whole]])


def _notch(values: Sequence[float]) -> float:
    low, high = quartiles(values)
    return 1.57 * (high - low) / len(values) ** 0.5
