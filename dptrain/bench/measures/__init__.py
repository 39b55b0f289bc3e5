"""What can be measured of a case; each function runs in a process of its own and returns JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dptrain.bench.case import Case
from dptrain.bench.measures.accuracy import accuracy
from dptrain.bench.measures.batch_size import batch_size
from dptrain.bench.measures.compiling import compiling
from dptrain.bench.measures.memory import memory
from dptrain.bench.measures.profile import profile
from dptrain.bench.measures.scaling import scaling
from dptrain.bench.measures.throughput import throughput


def results_of(case: Case, folder: Path | None = None) -> dict[str, Any]:
    """The results of a case, as docs/records.md has them; a profile leaves traces in the folder."""
    match case.measure:
        case "throughput":
            return throughput(case)
        case "scaling":
            return scaling(case)
        case "batch-size":
            return batch_size(case)
        case "memory":
            return memory(case)
        case "profile":
            return profile(case, folder)
        case "compile":
            return compiling(case)
        case "accuracy":
            return accuracy(case)
