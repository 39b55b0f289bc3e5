"""The physical batch size: how many examples to compute at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .device_memory import ran_out_of_memory

TOLERANCE = 0.03
"""How far below the best throughput the chosen size may be."""

PATIENCE = 2
"""Doublings without an improvement beyond the tolerance after which the search ends."""

MIN_TIMED_S = 0.1
MAX_SEARCH_S = 30.0
SMALLEST = 8


@dataclass(frozen=True)
class Trial:
    """Throughput in examples per second at one size."""

    size: int
    examples_per_s: float


def choose(run_batch: Callable[[int], None], largest: int, device: torch.device) -> tuple[int, list[Trial]]:
    """The smallest power of two that fits and is within 3 % of the best throughput, and what was seen.

    run_batch: computes one physical batch of the given size, on stand-in data: nothing private is
    measured. largest: no size beyond the first power of two of at least this is tried.
    """
    trials: list[Trial] = []
    started = time.perf_counter()
    size = min(SMALLEST, _ceil_power_of_two(largest))
    while size <= _ceil_power_of_two(largest):
        try:
            trials.append(Trial(size, size / _seconds_per_batch(run_batch, size, device)))
        except (RuntimeError, MemoryError) as error:
            if not ran_out_of_memory(error):
                raise
            if not trials and size > 1:
                size //= 2
                continue
            break
        if time.perf_counter() - started > MAX_SEARCH_S or _has_levelled_off(trials):
            break
        size *= 2
    if not trials:
        raise MemoryError("Not even one example fits into memory; choose a smaller --model or --image-size.")
    best = max(trial.examples_per_s for trial in trials)
    return next(t.size for t in trials if t.examples_per_s >= (1 - TOLERANCE) * best), trials


def _has_levelled_off(trials: list[Trial]) -> bool:
    if len(trials) <= PATIENCE:
        return False
    earlier = max(trial.examples_per_s for trial in trials[:-PATIENCE])
    return all(trial.examples_per_s <= (1 + TOLERANCE) * earlier for trial in trials[-PATIENCE:])


def _seconds_per_batch(run_batch: Callable[[int], None], size: int, device: torch.device) -> float:
    """Best of the repeats: other work on the machine only ever makes a repeat slower."""
    run_batch(size)
    best, started = float("inf"), time.perf_counter()
    while True:
        _finish(device)
        before = time.perf_counter()
        run_batch(size)
        _finish(device)
        now = time.perf_counter()
        best = min(best, now - before)
        if now - started > MIN_TIMED_S:
            return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ceil_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
