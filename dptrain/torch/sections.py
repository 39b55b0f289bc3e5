"""Names for the parts of a step, which profilers show: ``torch.profiler`` and what reads its traces."""

from __future__ import annotations

from torch.profiler import record_function

PREFIX = "dptrain::"


def section(name: str) -> record_function:
    """A context that a profiler shows as ``dptrain::NAME``; without a profiler it costs next to nothing."""
    return record_function(PREFIX + name)
