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
from dptrain.bench.checking import check
from dptrain.bench.environment import Quiet, environment
from dptrain.bench.outcome import Outcome
from dptrain.bench.peers import PEERS
from dptrain.bench.record import FINAL, Record, Records

TIMEOUT_S = 3 * 3600.0


@dataclass(frozen=True)
class Measured:
    """What a process has to tell of a case, however it ended."""

    outcome: Outcome
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
    folder = folder.resolve()
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
    answer = processes.run(_measured, case, folder, timeout_s=timeout_s)
    seconds = time.perf_counter() - started
    told = answer.value
    if told is None:  # the process died, or took too long
        told = Measured(answer, environment("cpu"), {}, ())
    found = told.outcome
    return Record(
        case,
        found.status,
        found.sentence,
        found.traceback,
        seconds,
        told.environment,
        told.quiet,
        found.value or {},
        told.warnings,
    )


def _measured(case: Case, folder: Path) -> Measured:
    from dptrain.bench.measures import results_of

    with Quiet() as quiet, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        outcome = processes.attempt(results_of, case, folder / "traces")
    sentences = tuple(sorted({str(w.message).split("\n")[0][:300] for w in warned}))
    return Measured(outcome, _environment(case), quiet.record(), sentences)


def _environment(case: Case) -> dict[str, Any]:
    found = environment(case.device)
    if case.engine in PEERS:
        found["versions"] |= PEERS[case.engine].versions()
    return found
