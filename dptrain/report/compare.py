"""Two measurements of the same cases: what became faster or slower."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptrain.report import intervals
from dptrain.report import quantities as q
from dptrain.report.errors import ReportError, needs, told_of
from dptrain.report.intervals import Interval
from dptrain.report.reading import Record, read, read_record

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("Case", "Quantity", "A", "B", "B / A", "95 % from", "95 % to", "Verdict")
SAME, TOO_FEW = "no difference", "too few samples"


@dataclass(frozen=True)
class Quantity:
    """A number of a record of which there are samples, or one alone.

    Attributes:
        value: what the record gives.
        samples: raw ones; empty where there is one number only.
        more, less: what it is called when it has grown or shrunk.
    """

    name: str
    value: float
    samples: tuple[float, ...] = ()
    more: str = "slower"
    less: str = "faster"


def compare(a: Record, b: Record) -> pd.DataFrame:
    """What changed from record A to record B: a row for each quantity that both hold.

    A verdict is given only where the 95 % bootstrap interval of the ratio of medians excludes 1; numbers of
    which there is one sample have no interval. The time relative to non-private training, taken in the same
    rounds, is the one to go by where the machine was not equally busy.

    Returns:
        `COLUMNS`; the sentences of `differences` are in its ``attrs["warnings"]``.
    """
    with told_of(f"The comparison of {a.id} and {b.id}"):
        found = needs("pandas").DataFrame(_rows(a, b), columns=list(COLUMNS))
        found.attrs["warnings"] = differences(a, b)
    return found


def compare_folders(a: Path | str, b: Path | str) -> pd.DataFrame:
    """`compare` of all cases that two folders have in common.

    Raises ReportError where they have none, or a folder has no records.
    """
    left, right = read(a).records, read(b).records
    common = [i for i in left if i in right]
    if not common:
        raise ReportError(f"{a} and {b} have no case in common; compare folders of the same cases.")
    both = [compare(left[i], right[i]) for i in common]
    rows = [row for one in both for row in one.itertuples(index=False, name=None)]
    found = needs("pandas").DataFrame(rows, columns=list(COLUMNS))
    warnings = list(dict.fromkeys(w for one in both for w in one.attrs["warnings"]))
    for name, only in ((a, left.keys() - right.keys()), (b, right.keys() - left.keys())):
        if only:
            warnings.append(f"{len(only)} case{'s are' if len(only) > 1 else ' is'} in {name} alone.")
    found.attrs["warnings"] = warnings
    return found


def compare_paths(a: Path | str, b: Path | str) -> pd.DataFrame:
    """`compare` of two record files, or `compare_folders` of two folders.

    Raises ReportError for one of each, and for what does not exist.
    """
    a, b = Path(a), Path(b)
    for path in (a, b):
        if not os.path.exists(path):
            raise ReportError(f"{path} does not exist; give two records or two folders of them.")
    if a.is_dir() != b.is_dir():
        raise ReportError("One is a folder and the other a record; give two records or two folders of them.")
    return compare_folders(a, b) if a.is_dir() else compare(read_record(a), read_record(b))


def differences(a: Record, b: Record) -> list[str]:
    """In what the two measurements differ besides what is compared: cases, machines, versions, load."""
    found = []
    changed = sorted(k for k in {*a.case, *b.case} if a.case.get(k) != b.case.get(k))
    if changed:
        said = ", ".join(f"{k} {a.case.get(k)} and {b.case.get(k)}" for k in changed)
        found.append(f"The cases differ: {said}.")
    one, other = a.environment, b.environment
    for name in ("machine", "threads", "python"):
        if one.get(name) != other.get(name):
            found.append(f"The {name} differs: {_plain(one.get(name))} and {_plain(other.get(name))}.")
    mine, theirs = one.get("versions") or {}, other.get("versions") or {}
    for library in sorted({*mine, *theirs}):
        if mine.get(library) != theirs.get(library):
            found.append(f"The version of {library} differs: {mine.get(library)} and {theirs.get(library)}.")
    for name, record in (("A", a), ("B", b)):
        others = q.number(record.quiet.get("cpu_share_of_others"))
        if others is not None and others > 0.1:
            found.append(f"Others had {100 * others:.0f} % of the machine while {name} was measured.")
    return found


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(str(v) for v in value.values() if v not in (None, ""))
    return str(value)


def _rows(a: Record, b: Record) -> list[dict[str, Any]]:
    if not (a.ok and b.ok):
        said = dict(zip(COLUMNS, (a.id, "status", a.status, b.status)))
        verdict = "same status" if a.status == b.status else "works now" if b.ok else "no longer works"
        return [said | {"Verdict": verdict if a.ok != b.ok else "not compared"}]
    left, right = ({one.name: one for one in _quantities(r)} for r in (a, b))
    return [_row(a.id, left[name], right[name]) for name in left if name in right]


def _row(case: str, a: Quantity, b: Quantity) -> dict[str, Any]:
    ratio = b.value / a.value if a.value else None
    interval = intervals.of_ratio(b.samples, a.samples) if a.samples and b.samples else None
    verdict = TOO_FEW if interval is None else _verdict(interval, a)
    low, high = interval or (None, None)
    return dict(zip(COLUMNS, (case, a.name, a.value, b.value, ratio, low, high, verdict)))


def _verdict(interval: Interval, quantity: Quantity) -> str:
    low, high = interval
    if low > 1:
        return quantity.more
    return quantity.less if high < 1 else SAME


def _quantities(record: Record) -> list[Quantity]:
    """Those of the record's measure."""
    results, found = record.results, []
    if record.measure in ("throughput", "scaling"):
        found += _of_race(record)
    if record.measure == "batch-size":
        found += _single(record, "largest batch", "largest", "larger", "smaller")
        tries = results.get("tries") or ()
        times = [
            q.number(t.get("physical_step_s")) for t in tries if t.get("batch_size") == results.get("largest")
        ]
        found += _sampled("physical step at the largest batch (s)", times)
    if record.measure in ("memory", "batch-size"):
        found += _single(record, "peak memory (bytes)", "peak_bytes", "more", "less")
    if record.measure == "profile":
        raw = results.get("raw_sections_s") or {}
        for section, seconds in q.sections(record).items():
            found += _sampled(f"{section} (s)", raw.get(section) or [seconds])
    if record.measure == "compile":
        found += _single(record, "first step (s)", "first_step_s", "slower", "faster")
        found += _sampled("later steps (s)", results.get("raw_later_step_s"))
    if record.measure == "accuracy":
        found += _sampled("test accuracy", results.get("accuracies"), "higher", "lower")
        found += _sampled("training (s)", results.get("raw_seconds"))
    return found


def _of_race(record: Record) -> list[Quantity]:
    """Seconds of a logical step, and the same over those of non-private training in the same rounds."""
    times = q.accumulate(record)
    own = q.logical_steps_s(q.contestant(record), times)
    base = q.logical_steps_s(q.contestant(record, "baseline"), times)
    found = _sampled("logical step (s)", own)
    if own and base:
        found += _sampled("time over non-private", [o / n for o, n in zip(own, base) if n])
    return found


def _sampled(
    name: str, values: Sequence[Any] | None, more: str = "slower", less: str = "faster"
) -> list[Quantity]:
    samples = q.samples(list(values or ()))
    if not samples:
        return []
    several = tuple(samples) if len(samples) >= intervals.FEWEST else ()
    return [Quantity(name, statistics.median(samples), several, more, less)]


def _single(record: Record, name: str, key: str, more: str, less: str) -> list[Quantity]:
    value = q.result(record, key)
    return [] if value is None else [Quantity(name, value, (), more, less)]
