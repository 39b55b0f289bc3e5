"""Interleaved timing: all contestants take turns, so that whatever the machine does hits all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .contestants import Contestant

#: rounds that are run whatever the time
LEAST_ROUNDS = 5


def seconds(run: Callable[[], None], device: str) -> float:
    """Wall time of one call, the device's work included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def warm_up(contestant: Contestant, device: str) -> None:
    """A logical step of three: probing, compiling, and what a first call allocates."""

    def logical_step() -> None:
        for _ in range(3):
            contestant.step()
        contestant.end()

    contestant.warm_up_s = seconds(logical_step, device)


def race(
    contestants: Sequence[Contestant], accumulate: int, limit_s: float, precise: float, device: str
) -> None:
    """Rounds, until the ratios are known to ``precise`` or the time is up.

    In a round each contestant takes the first physical step of a logical one, then a later one, which
    also accumulates, then the end. Who goes first changes from round to round.
    """
    started = time.perf_counter()
    rounds = 0
    while True:
        gc.collect()
        turn = rounds % len(contestants)
        order = [*contestants[turn:], *contestants[:turn]]
        for c in order:
            c.first_s.append(seconds(c.step, device))
        for c in order:
            c.later_s.append(seconds(c.step, device))
        for c in order:
            c.end_s.append(seconds(c.end, device))
        rounds += 1
        elapsed = time.perf_counter() - started
        if rounds < LEAST_ROUNDS:
            continue
        if elapsed * (rounds + 1) / rounds > limit_s or uncertainty(contestants, accumulate) < precise:
            return


def logical_s(contestant: Contestant, accumulate: int) -> float:
    """Seconds of a logical step of so many physical ones, from medians."""
    first, later, end = (
        statistics.median(each) for each in (contestant.first_s, contestant.later_s, contestant.end_s)
    )
    return first + (accumulate - 1) * later + end


def best(contestants: Sequence[Contestant], accumulate: int) -> Contestant:
    """The fastest non-private one: what all others are measured by."""
    ordinary = [c for c in contestants if c.kind == "non-private"]
    return min(ordinary, key=lambda c: logical_s(c, accumulate))


def paired_ratios(base: Contestant, contestant: Contestant, accumulate: int) -> list[float]:
    """Ratios of the speeds within each round."""

    def each(c: Contestant) -> list[float]:
        return [f + (accumulate - 1) * n + e for f, n, e in zip(c.first_s, c.later_s, c.end_s)]

    return [ours / theirs for ours, theirs in zip(each(base), each(contestant))]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def uncertainty(contestants: Sequence[Contestant], accumulate: int) -> float:
    """Half the notch of a box plot of the paired ratios, the widest of dptrain's.

    1.57 (q3 - q1) / sqrt(n): McGill, Tukey and Larsen 1978, "Variations of box plots", for about 95 %.
    """
    base = best(contestants, accumulate)
    widths = [0.0]
    for c in contestants:
        if c.kind == "dptrain":
            ratios = paired_ratios(base, c, accumulate)
            low, high = quartiles(ratios)
            widths.append(1.57 * (high - low) / len(ratios) ** 0.5)
    return max(widths)
