"""Names for the parts of a step, which profilers show: ``torch.profiler`` and what reads its traces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.profiler import record_function

PREFIX = "dptrain::"


def section(name: str) -> AbstractContextManager:
    """A context that a profiler shows as ``dptrain::NAME``; without a profiler it does nothing."""
    return record_function(PREFIX + name) if profiled() else nullcontext()


def profiled() -> bool:
    """Whether a profiler looks on. A step has hundreds of sections, and to tell nobody of them takes time."""
    return torch.autograd._profiler_enabled()
