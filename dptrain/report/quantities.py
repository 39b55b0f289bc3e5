"""Numbers of a record, by name. Each is None where the record does not hold it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dptrain.report import intervals
from dptrain.report.intervals import Interval
from dptrain.report.reading import Record

MIB = 2**20
GIB = 2**30


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def result(record: Record, *path: str) -> float | None:
    """A number in the results, at a path of names."""
    value: Any = record.results
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return number(value)


def contestant(record: Record, role: str = "case") -> Mapping[str, Any]:
    """The case itself among the contestants of a measurement, or the best baseline.

    A case that is not private is its best baseline.
    """
    found = record.results.get("contestants") or {}
    best = found.get(record.results.get("baseline")) or {}
    if role == "baseline":
        return best
    return next((c for c in found.values() if c.get("role") == "case"), best)


def plain_baseline(record: Record) -> tuple[str, Mapping[str, Any]] | None:
    """The fastest non-private way that is neither compiled nor scanned: what the paper compares with."""
    found = record.results.get("contestants") or {}
    plain = {
        name: c
        for name, c in found.items()
        if c.get("role") == "baseline"
        and number(c.get("examples_per_s"))
        and not any(word in name.lower() for word in ("compil", "scan", "jit"))
    }
    return max(plain.items(), key=lambda item: item[1]["examples_per_s"]) if plain else None


def logical_steps_s(contestant: Mapping[str, Any], accumulate: int) -> list[float]:
    """Seconds of each logical step that was measured: the first physical one, the later ones, the end."""
    first = contestant.get("raw_first_physical_step_s") or ()
    later = contestant.get("raw_later_physical_step_s") or ()
    end = contestant.get("raw_end_of_logical_step_s") or ()
    if accumulate == 1:
        later = later or [0.0] * len(first)
    return [f + (accumulate - 1) * n + e for f, n, e in zip(first, later, end)]


def examples_per_logical_step(record: Record) -> int:
    """Real examples that a logical step takes, on all devices."""
    case = record.case
    return int(case.get("batch_size", 1)) * accumulate(record) * int(case.get("devices", 1))


def accumulate(record: Record) -> int:
    """Physical batches in a logical one."""
    return int(record.case.get("accumulate", 1))


def throughput(record: Record) -> float | None:
    """Examples per second of the case."""
    return result(record, "examples_per_s")


def throughput_interval(record: Record) -> Interval | None:
    """Its 95 % interval, from the raw samples."""
    seconds = logical_steps_s(contestant(record), accumulate(record))
    found = intervals.of_median(seconds) if seconds else None
    middle = throughput(record)
    if found is None or middle is None:
        return None
    # Samples may be of one device of several: only the relative width is taken from them.
    median = statistics.median(seconds)
    return middle * median / found[1], middle * median / found[0]


def baseline_throughput(record: Record) -> float | None:
    """Examples per second of the best non-private way, in the same process."""
    return number(contestant(record, "baseline").get("examples_per_s"))


def ratio(record: Record) -> float | None:
    """Speed relative to the best non-private way, 1 for non-private itself."""
    return result(record, "ratio_to_non_private")


def ratio_interval(record: Record) -> Interval | None:
    """The 95 % interval of `ratio`, as the record has it."""
    return _pair(record.results.get("interval95_of_ratio"))


def cost(record: Record) -> float | None:
    """How many times as long as non-private training it takes."""
    found = ratio(record)
    return 1 / found if found else None


def cost_interval(record: Record) -> Interval | None:
    """The 95 % interval of `cost`."""
    found = ratio_interval(record)
    return (1 / found[1], 1 / found[0]) if found and min(found) > 0 else None


def largest(record: Record) -> float | None:
    """The largest physical batch that fits."""
    return result(record, "largest")


def accuracy(record: Record) -> float | None:
    """Mean test accuracy over seeds."""
    return result(record, "mean")


def accuracy_interval(record: Record) -> Interval | None:
    """The 95 % interval of the mean, the record's own or bootstrapped."""
    said = _pair(record.results.get("interval95"))
    return said or intervals.of_mean(samples(record.results.get("accuracies")))


def run_seconds(record: Record) -> float | None:
    """Median duration of a training run."""
    found = samples(record.results.get("raw_seconds"))
    return statistics.median(found) if found else None


def sections(record: Record, baseline: bool = False) -> dict[str, float]:
    """Seconds of each section of a step; of the non-private one on request."""
    found = record.results.get("baseline_sections_s" if baseline else "sections_s") or {}
    return {name: value for name, raw in found.items() if (value := number(raw)) is not None}


def samples(values: Any) -> list[float]:
    """The finite numbers among raw samples."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        return []
    return [v for v in map(number, values) if v is not None]


def _pair(values: Any) -> Interval | None:
    found = samples(values)
    return (found[0], found[1]) if len(found) == 2 else None
