"""A list of cases, one after another, each in a process of its own; what is finished is not done again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dptrain.bench import processes
from dptrain.bench.case import Case
from dptrain.bench.engines import check, framework
from dptrain.bench.environment import PACKAGES, Quiet, environment
from dptrain.bench.peers import PEERS
from dptrain.bench.record import FINAL, Record, Records

TIMEOUT_S = 3 * 3600.0


@dataclass(frozen=True)
class Measured:
    """What a process found out about a case."""

    results: dict[str, Any]
    environment: dict[str, Any]
    quiet: dict[str, Any]
    warnings: tuple[str, ...]


def run(
    cases: Iterable[Case],
    folder: Path,
    begins: Callable[[Case], None] = lambda case: None,
    ended: Callable[[Record], None] = lambda record: None,
    timeout_s: float = TIMEOUT_S,
) -> list[Record]:
    """The records of all cases, in their order; those that are there and final are read and not measured.

    Args:
        folder: where ``records/`` and ``traces/`` are.
        begins, ended: hear of a case before and after it is measured; `ended` also of those that were read.

    Raises:
        ValueError: a case that no engine could make sense of; nothing is measured then.
    """
    cases = list(dict.fromkeys(cases))
    for case in cases:
        check(case)
    records, out = Records(folder), []
    for case in cases:
        record = records.get(case)
        if record is None or record.status not in FINAL:
            begins(case)
            record = measure(case, folder, timeout_s)
            records.put(record)
        ended(record)
        out.append(record)
    return out


def measure(case: Case, folder: Path, timeout_s: float = TIMEOUT_S) -> Record:
    """One case in a process of its own."""
    started = time.perf_counter()
    outcome = processes.run(_measured, case, folder, timeout_s=timeout_s)
    seconds = time.perf_counter() - started
    if outcome.status != "ok":
        told = {"sentence": outcome.sentence, "traceback": outcome.traceback, "seconds": seconds}
        return Record(case, outcome.status, **told, environment=_environment(case))
    found: Measured = outcome.value
    return Record(
        case,
        "ok",
        seconds=seconds,
        environment=found.environment,
        quiet=found.quiet,
        results=found.results,
        warnings=found.warnings,
    )


def _measured(case: Case, folder: Path) -> Measured:
    from dptrain.bench.measures import results_of

    with Quiet() as quiet, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        results = results_of(case, folder / "traces")
    sentences = tuple(sorted({str(w.message).split("\n")[0][:300] for w in warned}))
    return Measured(results, _environment(case), quiet.record(), sentences)


def _environment(case: Case) -> dict[str, Any]:
    peer = PEERS.get(case.engine)
    extra = () if peer is None else peer.packages
    device = case.device if framework(case) == "torch" else "cpu"
    return environment(device, (*PACKAGES, *extra))
