"""When the next checkpoint is due."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 0.02
"""Of the time, what checkpoints may take."""
LONGEST_S = 300.0
"""Between two checkpoints, whatever they cost."""


class Pace:
    """As often as costs a small share of the time; or every so many steps, if the user says so."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._step, self._cost_s, self._ended_s = 0, 0.0, time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps."""
        if self._every is not None:
            return step - self._step >= self._every
        return time.perf_counter() - self._ended_s >= min(LONGEST_S, self._cost_s / SHARE)

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Around what writes one."""
        began_s = time.perf_counter()
        yield
        self._ended_s = time.perf_counter()
        self._step, self._cost_s = step, self._ended_s - began_s
