"""95 % bootstrap intervals of medians, as the paper has them.

Percentile bootstrap, with a fixed seed: the same samples give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
#: of fewer samples an interval says nothing
FEWEST = 3

Interval = tuple[float, float]


def of_median(samples: Sequence[float]) -> Interval | None:
    """The interval of the median; None for fewer than `FEWEST` samples."""
    if len(samples) < FEWEST:
        return None
    return _interval([samples], _median)


def of_mean(samples: Sequence[float]) -> Interval | None:
    """The interval of the mean; None for fewer than `FEWEST` samples."""
    if len(samples) < FEWEST:
        return None
    return _interval([samples], np.mean)


def of_ratio(above: Sequence[float], below: Sequence[float]) -> Interval | None:
    """The interval of median(above) / median(below), two measurements that do not know of each other."""
    if min(len(above), len(below)) < FEWEST:
        return None
    return _interval([above, below], _ratio_of_medians)


def _median(samples: np.ndarray, axis: int = -1) -> Any:
    return np.median(samples, axis=axis)


def _ratio_of_medians(above: np.ndarray, below: np.ndarray, axis: int = -1) -> Any:
    return np.median(above, axis=axis) / np.median(below, axis=axis)


def _interval(samples: list[Sequence[float]], statistic: Callable[..., Any]) -> Interval:
    from scipy.stats import bootstrap

    arrays = [np.asarray(s, dtype=np.float64) for s in samples]
    found = bootstrap(
        arrays,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
